"""What the supervisor writes into the run directory while ranks train: status, progress, and the limit of the logs.

A full disk must not end the watch: what cannot be written is logged and tried again at the next interval, and the rank
that fails because of the disk reports it. Nobody else should change the status; if somebody does, it is repaired from
the last one that was written here, unless it has become terminal.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from labkit.experiment.run_directory import TERMINAL, RunDirectory, write_json
from labkit.launch.board import HeartbeatTable
from labkit.launch.child import Child
from labkit.runs import logs
from labkit.runs import status as run_status


class RunRecord:
    """The status, progress and logs of one run, as its supervisor writes them."""

    def __init__(self, directory: RunDirectory, last_status: dict[str, Any]) -> None:
        self.directory = directory
        self.last_status = last_status
        """The status as last written: the file may be damaged during the run."""
        self._written_signature: tuple[int, int] | None = None
        """Inode and modification time of the status as last written."""

    @property
    def has_ended(self) -> bool:
        """Whether the state as last written or read is terminal."""
        return self.last_status.get("state") in TERMINAL

    def update_status(self, **changes: Any) -> None:
        """Change the status; a terminal state that another process has written stays and is read."""

        def write() -> None:
            self.last_status = run_status.update(self.directory, fallback=self.last_status, **changes)
            self._written_signature = self._signature()

        attempt(write)

    def status_was_changed(self) -> bool:
        """Return whether another process has changed the status since it was last written here."""
        return self._written_signature is not None and self._signature() != self._written_signature

    def write_terminal_state(self, changes: dict[str, Any]) -> None:
        """Write the terminal state; if that fails, write it with a generic cause."""
        try:
            run_status.update(self.directory, fallback=self.last_status, **changes)
        except Exception as error:
            traceback.print_exc()
            if not self.directory.path.is_dir():
                return
            message = f"the run ended as {changes['state']}, but why cannot be written: {type(error).__name__}"
            cause = None if changes["state"] == "finished" else run_status.cause("supervisor", message)
            run_status.update(self.directory, fallback=self.last_status, state=changes["state"], cause=cause)

    def write_progress(self, children: Sequence[Child], heartbeats: HeartbeatTable) -> None:
        """Write progress.json: step, phase, silence (s) and memory (bytes) of every rank."""
        now, ranks = time.monotonic(), []
        for child in children:
            rank_status = heartbeats.rank_status(child.rank)
            ranks.append(
                {
                    "rank": child.rank,
                    "step": rank_status.step,
                    "phase": rank_status.phase if child.running else "done",
                    "silent_s": round(now - rank_status.progress, 2) if child.running else 0.0,
                    "memory_bytes": rank_status.memory_bytes,
                }
            )
        attempt(lambda: write_json(self.directory.progress, {"time": time.time(), "ranks": ranks}))

    def cap_logs(self, children: Sequence[Child]) -> None:
        """Limit the size of all logs of the run."""
        for path in (*(self.directory.log(child.rank) for child in children), self.directory.supervisor_log):
            attempt(partial(logs.cap, path))

    def _signature(self) -> tuple[int, int]:
        """Return inode and modification time of the status, which change whenever it is written."""
        try:
            info = os.stat(self.directory.status, follow_symlinks=False)
        except OSError:
            return 0, 0
        return info.st_ino, info.st_mtime_ns


def attempt(action: Callable[[], Any]) -> None:
    """Call `action` and log an OSError."""
    try:
        action()
    except OSError as error:
        log_line(f"cannot write: {error}")


def log_line(text: str) -> None:
    """Print a line to the log of the supervisor, if it can be written."""
    try:
        print(f"labkit: {text}", file=sys.stderr, flush=True)  # noqa: T201  (the log of the supervisor)
    except OSError:
        pass
