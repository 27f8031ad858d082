"""The end of everything that a run has started: loader processes, programs that somebody's code called, daemons.

The supervisor adopts every descendant whose parent ends (labkit.runs.processes.adopt_orphans), so whatever is left is
sooner or later its child. A child that has not been waited for keeps its pid: signalling it can never strike another.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from labkit.runs.processes import children_of

ALONE_S = 0.2
"""How long processes without a rank get to end by themselves (they notice that its pipes are closed)."""
TERM_S = 1.0
"""Time between SIGTERM and SIGKILL."""
BOUND_S = 10.0
"""After this the run ends all the same: what does not go on SIGKILL hangs in the kernel."""


def end_descendants(alone_s: float = ALONE_S) -> list[int]:
    """End and reap all children of this process and all that these leave behind; returns pids that cannot be ended.

    Ranks must have been reaped before: their exit codes are lost here.
    """
    begun, asked = time.monotonic(), set[int]()
    while _reap():
        passed = time.monotonic() - begun
        if passed > BOUND_S:
            return _children()
        if passed > alone_s:
            insist = passed > alone_s + TERM_S
            for pid in _children():
                if insist or pid not in asked:
                    asked.add(pid)
                    with contextlib.suppress(OSError):
                        os.kill(pid, signal.SIGKILL if insist else signal.SIGTERM)
        time.sleep(0.01)
    return []


def _reap() -> bool:
    """Take leave of children that have ended; True if there are others."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _children() -> list[int]:
    """Pids of the direct children."""
    with contextlib.suppress(OSError, ValueError):
        tasks = Path("/proc/self/task").iterdir()
        return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
    return children_of(os.getpid())


class Strays:
    """Reaps adopted processes that have ended while the run goes on, so that no zombies gather."""

    PATIENCE_S = 1.0
    """Whoever has started a process here and waits for it comes first."""

    def __init__(self) -> None:
        self._seen: tuple[int, float] | None = None

    def reap(self, ranks: set[int]) -> None:
        """Called now and then; `ranks` are left alone."""
        with contextlib.suppress(ChildProcessError):
            info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if info is None or info.si_pid in ranks:
                return
            if self._seen is None or self._seen[0] != info.si_pid:
                self._seen = (info.si_pid, time.monotonic())
            elif time.monotonic() - self._seen[1] > self.PATIENCE_S:
                os.waitpid(info.si_pid, os.WNOHANG)
                self._seen = None
