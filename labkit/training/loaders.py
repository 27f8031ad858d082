"""Loader processes of a rank: none outlives it, whatever its data does meanwhile."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_rank(rank: int, worker: int = 0) -> None:
    """Called in loader process number `worker`: the kernel kills it when process `rank`, its parent, ends (Linux).

    torch's own watch would not do: it is asked between samples only, and a sample may hang.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != rank:
        os._exit(1)
