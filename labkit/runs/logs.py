"""Log files: their last lines, and a cap on their size."""

from __future__ import annotations

from pathlib import Path

from labkit.experiment import safe_files

LOG_CAP_BYTES = 8 * 2**20


def tail(path: Path, lines: int = 20) -> list[str]:
    """The last lines of a log, [] if there is none. Reads at most 400 bytes a line."""
    try:
        return safe_files.read_tail(path, 400 * lines).decode("utf-8", "replace").splitlines()[-lines:]
    except OSError:
        return []


def cap(path: Path, most: int = LOG_CAP_BYTES) -> None:
    """Shorten a log that has grown beyond `most` bytes to its end. Its writer appends, so it goes on behind that."""
    try:
        if safe_files.size(path) <= most:
            return
    except OSError:
        return  # there is none, or something else stands there
    # No more than that is read: a writer may be faster than a reader, who would never come to an end.
    safe_files.keep_end(path, most // 4, b"[labkit: this log grew too long; only its end is kept]\n")
