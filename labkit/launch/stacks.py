"""The stacks that faulthandler writes into a log on SIGUSR1, which show whether a stalled rank waits for others."""

from __future__ import annotations

import re
from collections.abc import Sequence

_THREAD = re.compile(r"(Current thread|Thread) 0x[0-9a-f]+")
# Code in which a rank waits for its peers: collectives and stores of torch, and labkit's own shared memory.
_WAITING_SITES = ("/torch/distributed/", "/labkit/parallel/shared_memory.py")
MAX_DEPTH = 8
"""A collective is at most this many frames from the top; deeper frames are only the framework that runs the model."""


def main_thread(lines: Sequence[str]) -> list[str]:
    """Return the frames of the main thread, innermost first: the last thread of the last dump in these log lines."""
    starts = [number for number, line in enumerate(lines) if _THREAD.match(line)]
    frames: list[str] = []
    for line in lines[starts[-1] + 1 :] if starts else ():
        if not line.startswith("  File "):
            break
        frames.append(line)
    return frames


def waits_for_others(lines: Sequence[str]) -> bool:
    """Return whether the main thread of the last dump in these log lines is in a collective."""
    return any(place in line for line in main_thread(lines)[:MAX_DEPTH] for place in _WAITING_SITES)
