"""The stacks that faulthandler writes into a log on SIGUSR1: does a rank that stands still wait for others?"""

from __future__ import annotations

import re
from collections.abc import Sequence

_THREAD = re.compile(r"(Current thread|Thread) 0x[0-9a-f]+")
# Where a rank waits for its peers: collectives and stores of torch, and labkit's own shared memory.
_MEETING_PLACES = ("/torch/distributed/", "/labkit/parallel/shared_memory.py")
INNERMOST = 8
"""A collective stands within so many frames of the top; further down it is only the framework that runs the model."""


def main_thread(lines: Sequence[str]) -> list[str]:
    """The frames of the main thread, innermost first: the last thread of the last dump in these lines of a log."""
    begins = [number for number, line in enumerate(lines) if _THREAD.match(line)]
    frames: list[str] = []
    for line in lines[begins[-1] + 1 :] if begins else ():
        if not line.startswith("  File "):
            break
        frames.append(line)
    return frames


def waits_for_others(lines: Sequence[str]) -> bool:
    """True if the main thread of the last dump in these lines of a log is in a collective."""
    return any(place in line for line in main_thread(lines)[:INNERMOST] for place in _MEETING_PLACES)
