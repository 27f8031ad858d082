"""Steady-state step times: what is left out, the median, and how sure it is.

Step times follow each other closely (a slow moment lasts several steps), so intervals come from a moving-block
bootstrap (Künsch, 1989) instead of one that shuffles single steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MIN_STEPS = 10
MAX_RELATIVE_WIDTH = 0.5
RESAMPLES = 400
CONFIDENCE = 0.95

Floats = NDArray[np.float64]


def warmup(steps: int) -> int:
    """How many first steps are left out: a tenth, at least 3 and at most 20."""
    return min(steps, max(3, min(20, steps // 10)))


@dataclass(frozen=True)
class SteadyState:
    """Step times in seconds after the warm-up."""

    seconds: Floats
    warmup_steps: int

    @classmethod
    def of(cls, seconds: Floats, period: int = 1) -> SteadyState:
        """Of all steps; where ranks meet once in `period` steps only, of means over so many (see methods.period)."""
        skipped = warmup(len(seconds))
        return cls(rolling(np.asarray(seconds[skipped:], dtype=np.float64), period), skipped)

    @property
    def median(self) -> float | None:
        return float(np.median(self.seconds)) if len(self.seconds) else None

    def quantile(self, fraction: float) -> float | None:
        return float(np.quantile(self.seconds, fraction)) if len(self.seconds) else None

    @property
    def complaint(self) -> str | None:
        """Why no claim can be made from these steps; None if one can."""
        if len(self.seconds) < MIN_STEPS:
            needed = MIN_STEPS + self.warmup_steps
            return f"not enough steps ({len(self.seconds)} after the warm-up; run at least {needed})"
        return None

    def medians(self, seed: int = 0) -> Floats:
        """Bootstrap distribution of the median, shape [RESAMPLES]."""
        n = len(self.seconds)
        block = max(1, round(n ** (1 / 3)))
        random = np.random.default_rng(seed)
        starts = random.integers(0, n - block + 1, size=(RESAMPLES, -(-n // block)))
        index = (starts[..., None] + np.arange(block)).reshape(RESAMPLES, -1)[:, :n]
        return np.asarray(np.median(self.seconds[index], axis=1))


def ratio(numerator: SteadyState, denominator: SteadyState) -> tuple[float, float, float]:
    """Ratio of the two medians with its interval: (value, low, high). Both need enough steps."""
    assert numerator.median is not None
    assert denominator.median is not None
    spread = numerator.medians(seed=1) / denominator.medians(seed=2)
    tail = (1 - CONFIDENCE) / 2
    return numerator.median / denominator.median, float(np.quantile(spread, tail)), float(np.quantile(spread, 1 - tail))


def rolling(values: Floats, period: int) -> Floats:
    """Mean over each `period` consecutive values, so that what comes once in a period counts: (n - period + 1,).

    Fewer values than a period make one mean.
    """
    if period <= 1 or not len(values):
        return np.asarray(values, dtype=np.float64)
    period = min(period, len(values))
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return np.asarray((total[period:] - total[:-period]) / period)
