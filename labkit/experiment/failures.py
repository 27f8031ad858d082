"""The message of any exception: the same words for the events of a rank and for its supervisor."""

from __future__ import annotations

import re

_OF_A_LOADER = re.compile(r"Caught (\S+) in DataLoader worker process (\d+)\.\n")
_LOADER_GONE = re.compile(r"DataLoader worker \(pid\(s\) ([\d, ]+)\) exited unexpectedly")
_TRACEBACK = "Traceback (most recent call last):"


def message_of(error: BaseException) -> str:
    """Return the text of an exception, or a substitute in angle brackets if its `__str__` raises."""
    try:
        return str(error)
    except BaseException as second:
        return f"<its message cannot be made: {type(second).__name__}>"


def original_message(error: BaseException) -> str:
    """Return the text of an exception; for one from a DataLoader worker its own, in plain words."""
    message = message_of(error)
    if gone := _LOADER_GONE.search(message):
        return f"loader process {gone[1]} ended by itself: the data set may call os._exit or sys.exit, or have crashed"
    caught = _OF_A_LOADER.match(message)
    if caught is None or _TRACEBACK not in message:
        return message
    lines = message.rpartition(_TRACEBACK)[2].splitlines()
    # The indented frames are followed by `package.Type: message`, on one or more lines.
    begin = next((number for number, line in enumerate(lines) if line and not line[0].isspace()), None)
    if begin is None:
        return message
    text = "\n".join(lines[begin:]).strip()
    kind, _, words = text.partition(": ")
    own = words if kind.rpartition(".")[2] == caught[1].rpartition(".")[2] else text
    first, *others = (own or caught[1]).splitlines()
    return "\n".join([f"{first} (in loader process {caught[2]})", *others])
