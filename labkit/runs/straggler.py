"""The straggler: the rank that computes longest, without waiting, so that the others wait for it.

Step times do not show it, because ranks that wait for each other all take as long as the slowest. Ranks are compared
step by step, so that a slow moment of the whole machine cancels out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from labkit.runs.data import RunData
from labkit.runs.steady import MIN_STEPS, warmup

STRAGGLER_FACTOR = 1.5
"""A rank that computes at least this many times as long as the median of the others is a straggler."""


@dataclass(frozen=True)
class Straggler:
    """The slowest rank, and how many times as long as the median of the others it computes (median over steps)."""

    rank: int
    """Number of the rank."""
    factor: float
    """How many times as long as the median of the other ranks it computes."""

    def __str__(self) -> str:
        return f"rank {self.rank} is the straggler: it computes {self.factor:.1f} times as long as the others (median)"


def straggler(data: RunData, last: int | None = None) -> Straggler | None:
    """Return the straggler after the warm-up, or in the `last` steps; None if there is none or steps are too few."""
    columns = data.compute
    steps = min((len(seconds) for seconds in columns), default=0)
    first = max(warmup(steps), 0 if last is None else steps - last)
    if len(columns) < 2 or steps - first < MIN_STEPS:
        return None
    table = np.stack([seconds[first:steps] for seconds in columns]).astype(np.float64)
    table = table[:, np.isfinite(table).all(axis=0) & (table > 0).all(axis=0)]
    if table.shape[1] < MIN_STEPS:
        return None
    slowest = int(np.argmax(np.median(table, axis=1)))
    others = np.median(np.delete(table, slowest, axis=0), axis=0)
    factor = float(np.median(table[slowest] / others))
    return Straggler(slowest, factor) if factor >= STRAGGLER_FACTOR else None
