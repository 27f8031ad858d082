"""Ends every process that a run has started: loader processes, programs started by the user's code, daemons.

The supervisor adopts every descendant whose parent ends (labkit.runs.processes.adopt_orphans), so every remaining
process becomes its child sooner or later. A child keeps its pid until it is reaped, so a signal never hits another
process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from labkit.runs.processes import children_of

SELF_EXIT_S = 0.2
"""How long processes may take to end by themselves once their rank is gone and its pipes are closed (s)."""
TERM_S = 1.0
"""Time between SIGTERM and SIGKILL (s)."""
GIVE_UP_S = 10.0
"""After this time (s) the run ends anyway: a process that does not end on SIGKILL is blocked in the kernel."""


def end_descendants(self_exit_s: float = SELF_EXIT_S) -> list[int]:
    """End and reap all children of this process and their descendants; return the pids that cannot be ended.

    Ranks must have been reaped before, because exit codes are lost here.
    """
    begun, signalled = time.monotonic(), set[int]()
    while _reap():
        elapsed = time.monotonic() - begun
        if elapsed > GIVE_UP_S:
            return _child_pids()
        if elapsed > self_exit_s:
            force = elapsed > self_exit_s + TERM_S
            for pid in _child_pids():
                if force or pid not in signalled:
                    signalled.add(pid)
                    with contextlib.suppress(OSError):
                        os.kill(pid, signal.SIGKILL if force else signal.SIGTERM)
        time.sleep(0.01)
    return []


def _reap() -> bool:
    """Reap children that have ended; return True if others remain."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _child_pids() -> list[int]:
    """Return the pids of the direct children."""
    with contextlib.suppress(OSError, ValueError):
        tasks = Path("/proc/self/task").iterdir()
        return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
    return children_of(os.getpid())


class OrphanReaper:
    """Reaps adopted processes that end during the run, so that zombies do not accumulate."""

    PATIENCE_S = 1.0
    """Code of this process that waits for its own child gets this long (s) to reap it first."""

    def __init__(self) -> None:
        self._candidate: tuple[int, float] | None = None

    def reap(self, ranks: set[int]) -> None:
        """Reap at most one ended child that is not in `ranks` (pids). Call regularly."""
        with contextlib.suppress(ChildProcessError):
            info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if info is None or info.si_pid in ranks:
                return
            if self._candidate is None or self._candidate[0] != info.si_pid:
                self._candidate = (info.si_pid, time.monotonic())
            elif time.monotonic() - self._candidate[1] > self.PATIENCE_S:
                os.waitpid(info.si_pid, os.WNOHANG)
                self._candidate = None
