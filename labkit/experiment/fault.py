"""Faults in a user's own data, model or loss, each described in one sentence."""

from __future__ import annotations


class TaskFault(ValueError):
    """A task that cannot be trained as the experiment asks; the message is one sentence for the author of the task.

    It is passed from a rank to its supervisor, which ends the run as `failed` with the cause `task` (issue 11).
    """

    def __init__(self, sentence: object) -> None:
        super().__init__(one_line(str(sentence)))


def one_line(text: str, limit: int = 700) -> str:
    """Return the text without line breaks, at most `limit` characters long."""
    joined = " ".join(text.split())
    return joined if len(joined) <= limit else joined[: limit - 1] + "…"


def describe_error(error: BaseException, limit: int = 300) -> str:
    """Return the type of an exception and its message in one line of at most `limit` characters.

    An exception whose `__str__` raises is described by its type alone.
    """
    try:
        text = str(error)
    except Exception:
        text = ""
    return one_line(f"{type(error).__name__}: {text}" if text else type(error).__name__, limit)
