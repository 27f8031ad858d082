"""Log files: reading their last lines and limiting their size."""

from __future__ import annotations

from pathlib import Path

from labkit.experiment import safe_files

LOG_CAP_BYTES = 8 * 2**20


def tail(path: Path, lines: int = 20) -> list[str]:
    """Return the last lines of a log, [] if there is none. Reads at most 400 bytes per line."""
    try:
        return safe_files.read_tail(path, 400 * lines).decode("utf-8", "replace").splitlines()[-lines:]
    except OSError:
        return []


def cap(path: Path, limit: int = LOG_CAP_BYTES) -> None:
    """Shorten a log that has grown beyond `limit` bytes to its end; its writer appends and so continues after that."""
    try:
        if safe_files.size(path) <= limit:
            return
    except OSError:
        return  # there is no log, or something else has its path
    # The amount read is bounded: a reader could never catch up with a faster writer.
    safe_files.truncate_to_tail(path, limit // 4, b"[labkit: this log grew too long; only its end is kept]\n")
