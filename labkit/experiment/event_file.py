"""A file of events: one JSON object per line, appended in a single write by a single process."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from labkit.experiment import safe_files


class EventFile:
    """Appends events to one file. Every event gets the wall-clock time and the monotonic time (s)."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._file = safe_files.open_to_append(path)

    def append(self, event: str, **fields: Any) -> None:
        """Append one event; raise OSError if the disk does not take all of it (then nothing of it is kept)."""
        head = {"event": event, "time": time.time(), "monotonic": time.monotonic()}
        line = json.dumps(safe_files.finite(head | fields), separators=(",", ":"), allow_nan=False).encode() + b"\n"
        with self._lock:
            written = os.write(self._file, line)
            if written < len(line):
                self._write_rest(line[written:], written)

    def _write_rest(self, rest: bytes, written: int) -> None:
        """Write `rest` after a short write; on an error remove the partial line, which would spoil the next."""
        while rest:
            try:
                count = os.write(self._file, rest)
            except OSError:
                os.ftruncate(self._file, os.fstat(self._file).st_size - written)
                raise
            rest, written = rest[count:], written + count

    def sync(self) -> None:
        """Force all events to the disk (fsync)."""
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)
