"""Loader processes of a rank: none outlives it, even if its data set hangs."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_rank(rank: int, worker: int = 0) -> None:
    """Make the kernel kill this loader process when its parent, the process with the id `rank`, ends (Linux).

    torch's own check does not suffice: it runs only between samples, and a sample may hang. `worker` is unused.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != rank:
        os._exit(1)
