"""What a person's own data, model or loss cannot do, said in one sentence."""

from __future__ import annotations


class TaskFault(ValueError):
    """A task that cannot be trained as the experiment asks; the message is one sentence for whoever made the task.

    It crosses from a rank to its supervisor, which ends the run as `failed` with the cause `task` (issue 11).
    """

    def __init__(self, sentence: object) -> None:
        super().__init__(one_line(str(sentence)))


def one_line(text: str, limit: int = 700) -> str:
    """The text without line breaks, at most `limit` characters long."""
    joined = " ".join(text.split())
    return joined if len(joined) <= limit else joined[: limit - 1] + "…"


def named(error: BaseException, limit: int = 300) -> str:
    """The kind of an exception and the first lines of its message, in one line.

    An exception whose own text cannot be made is named by its kind alone.
    """
    try:
        text = str(error)
    except Exception:
        text = ""
    return one_line(f"{type(error).__name__}: {text}" if text else type(error).__name__, limit)
