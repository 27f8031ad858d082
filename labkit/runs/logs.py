"""Log files: their last lines, and a cap on their size."""

from __future__ import annotations

import os
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
    if not path.exists() or path.stat().st_size <= most:
        return
    with path.open("rb") as file:
        file.seek(-most // 4, os.SEEK_END)
        end = file.read(most // 4)  # and no more: a writer may be faster than a reader, who would never come to an end
    with path.open("r+b") as file:
        file.truncate(0)
    with path.open("ab") as file:
        file.write(b"[labkit: this log grew too long; only its end is kept]\n" + end)
