"""Reading the event files of a run as they grow: what is new, line by line, within a time budget.

The files are untrusted. A line that is too long, or that the handler cannot read, is skipped and counted.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from labkit.experiment import safe_files
from labkit.experiment.run_directory import RunDirectory

MAX_RANKS = 4096
MAX_LINE_BYTES = 4 * 2**20
MAX_UNREADABLE_BYTES = 64 * 2**20
"""A file with this much that is not an event is not read any further."""
_CHUNK_BYTES = 128 * 2**10
_FILE = re.compile(r"rank-(0|[1-9][0-9]{0,3})\.jsonl")

Handler = Callable[[int, dict[str, Any]], bool]
"""Takes in an event of a rank; False if it cannot be read."""


class _Tail:
    """How far one file has been read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        self.in_long_line = False
        self.unreadable_bytes = 0


class EventReader:
    """The event files of all ranks, or others; `handle` gets every event with the number of its file, from 0."""

    def __init__(self, directory: RunDirectory, handle: Handler) -> None:
        self._directory, self._handle = directory, handle
        self._tails: list[_Tail] = []
        self._turn = 0
        self.skipped_lines = 0
        """Complete lines that could not be read."""

    def ranks_with_a_file(self) -> int:
        """Return one more than the highest rank that has an event file."""
        try:
            matches = [_FILE.fullmatch(name) for name in os.listdir(self._directory.path)]
        except OSError:
            return 0
        return max((int(match[1]) + 1 for match in matches if match), default=0)

    def add_rank(self) -> None:
        """Read the file of one more rank from now on."""
        self.add_file(self._directory.events(len(self._tails)))

    def add_file(self, path: Path) -> None:
        """Read one more file from now on."""
        self._tails.append(_Tail(path))

    def read(self, budget_s: float | None = None) -> bool:
        """Read what is new for at most about `budget_s` seconds; True when everything has been read."""
        deadline = math.inf if budget_s is None else time.perf_counter() + budget_s
        waiting = len(self._tails)
        while waiting:
            number = self._turn % len(self._tails)
            waiting = waiting - 1 if self._read_some(number, deadline) else len(self._tails)
            # A rank cut short by the clock continues next time; the others get their turn in order.
            self._turn = number + 1
            if time.perf_counter() >= deadline:
                return waiting == 0
        return True

    def _read_some(self, number: int, deadline: float) -> bool:
        """Read one chunk of a file; True if no complete line was left to read."""
        tail = self._tails[number]
        path = tail.path
        try:
            if tail.unreadable_bytes > MAX_UNREADABLE_BYTES or os.lstat(path).st_size <= tail.offset:
                return True
            with safe_files.reading(path) as file:
                chunk = os.pread(file, _CHUNK_BYTES, tail.offset)
                while b"\n" not in chunk and len(chunk) < MAX_LINE_BYTES:
                    more = os.pread(file, _CHUNK_BYTES, tail.offset + len(chunk))
                    if not more:
                        break
                    chunk += more
        except OSError:
            return True
        end = chunk.rfind(b"\n")
        if end < 0:
            if len(chunk) < MAX_LINE_BYTES:
                return True  # an unfinished last line
            tail.offset += len(chunk)  # too long for an event: skip it to its end
            tail.unreadable_bytes += len(chunk)
            tail.in_long_line = True
            return False
        start = 0
        while start <= end:
            stop = chunk.index(b"\n", start)
            self._read_line(number, chunk[start:stop])
            start = stop + 1
            if time.perf_counter() >= deadline:
                break
        tail.offset += start
        return False

    def _read_line(self, number: int, line: bytes) -> None:
        tail = self._tails[number]
        if tail.in_long_line:
            tail.in_long_line = False
            self.skipped_lines += 1
            return
        if not line.strip():
            return
        try:
            event = safe_files.from_json(line, bounded_numbers=False)
            if isinstance(event, dict) and self._handle(number, event):
                return
        except (ValueError, RecursionError, OverflowError):
            pass
        self.skipped_lines += 1
        tail.unreadable_bytes += len(line)
