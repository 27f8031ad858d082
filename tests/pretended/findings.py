"""What a GPU would not have done, or would have waited for, by file and line."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from pathlib import Path

import labkit

PACKAGE = str(Path(labkit.__file__).parent) + "/"
LEVELS = 2
PROBES = ("sparsity/two_four.py", "training/after/")
"""Files that try kernels which no CPU has, and say so, and those that run after the training, on one rank."""


class Findings:
    """Sentences with the number of times that each was found."""

    def __init__(self) -> None:
        self.faults: Counter[str] = Counter()
        """What fails on a GPU."""
        self.waits: Counter[str] = Counter()
        """Where the host waits for the GPU inside a step."""
        self.in_step = False
        """Whether waits count now."""

    def fault(self, text: str) -> None:
        """Note what would fail, with the line of labkit that does it."""
        where = place()
        if not where.startswith(PROBES):
            self.faults[f"{text} at {where}"] += 1

    def wait(self, text: str) -> None:
        """Note a wait for the GPU, if the training loop waits inside a step; other threads may."""
        if self.in_step and threading.current_thread() is threading.main_thread():
            self.waits[f"{text} at {place()}"] += 1


def place() -> str:
    """Return file and line of the innermost calls that are labkit's own, the innermost first."""
    places: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(places) < LEVELS:  # type: ignore[redundant-expr]
        if frame.f_code.co_filename.startswith(PACKAGE):
            places.append(f"{frame.f_code.co_filename.removeprefix(PACKAGE)}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(places) or "no line of labkit"


FINDINGS = Findings()
"""The findings of this process."""
