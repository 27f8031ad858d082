"""The deadline of a run that is being ended: ranks that still run by then are ended by force.

A stop sets it to the end of the grace period, a failed rank to a few seconds later, a stalled rank to now; the earliest
counts. Ranks get SIGTERM first and SIGKILL a little later, because one that is stopped or blocked ignores SIGTERM.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence

from labkit.launch.board import HeartbeatTable
from labkit.launch.child import Child

KILL_AFTER_S = 3.0
"""Time between SIGTERM and SIGKILL (s)."""
BLOCKING_S = 0.5
"""When the time to stop is over, the ranks without progress for this long (s) are checked for blocking the others."""


class Deadline:
    """The time (monotonic seconds) from which ranks are ended by force; none at first."""

    def __init__(self, heartbeats: HeartbeatTable) -> None:
        self._heartbeats = heartbeats
        self._time: float | None = None
        self.blocking_ranks: list[int] = []
        """The ranks that the others were waiting for when the time to stop was over."""

    @property
    def is_set(self) -> bool:
        """Whether the run is being ended."""
        return self._time is not None

    def advance(self, seconds: float = 0.0) -> None:
        """Set the deadline to `seconds` from now if that is earlier than the present one."""
        deadline = time.monotonic() + seconds
        self._time = deadline if self._time is None else min(self._time, deadline)

    def enforce(self, children: Sequence[Child]) -> None:
        """Send SIGTERM to running ranks when the deadline has passed, and SIGKILL a little later."""
        now = time.monotonic()
        if self._time is None or now < self._time:
            return
        if all(child.terminated is None for child in children):
            running = [child.rank for child in children if child.running]
            self.blocking_ranks = self._heartbeats.stalled_ranks(BLOCKING_S, running)
        for child in children:
            if child.running and child.terminated is None:
                child.terminated = now
                child.send(signal.SIGTERM)
            elif child.running and child.terminated is not None and now - child.terminated > KILL_AFTER_S:
                child.send(signal.SIGKILL)
