"""The writer of `rank-N.jsonl`: one event a line, appended in one write, by one process."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from pathlib import Path
from typing import Any


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


class EventWriter:
    """Appends events to one file. Every event gets its rank and both clocks."""

    def __init__(self, path: Path, rank: int) -> None:
        self.rank = rank
        self._lock = threading.Lock()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, event: str, **fields: Any) -> None:
        """Append one event; OSError when the disk does not take it whole (then nothing of it stays)."""
        head = {"event": event, "rank": self.rank, "time": time.time(), "monotonic": time.monotonic()}
        line = json.dumps(finite(head | fields), separators=(",", ":"), allow_nan=False).encode() + b"\n"
        with self._lock:
            written = os.write(self._file, line)
            if written < len(line):
                self._write_rest(line[written:], written)

    def _write_rest(self, rest: bytes, written: int) -> None:
        """After a short write: the next write gives the reason. Half a line would spoil the line after it."""
        while rest:
            try:
                count = os.write(self._file, rest)
            except OSError:
                os.ftruncate(self._file, os.fstat(self._file).st_size - written)
                raise
            rest, written = rest[count:], written + count

    def sync(self) -> None:
        """Make sure that all events are on the disk."""
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)
