"""Steady-state step times: the warm-up that is left out, the median and its confidence interval.

Step times are autocorrelated (a slow moment lasts several steps), so intervals come from a moving-block bootstrap
(Künsch, 1989) instead of one that resamples single steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MIN_STEPS = 10
MAX_RELATIVE_WIDTH = 0.5
RESAMPLES = 400
CONFIDENCE = 0.95

Floats = NDArray[np.float64]


def warmup(steps: int) -> int:
    """Return how many first steps are left out: a tenth, at least 3 and at most 20."""
    return min(steps, max(3, min(20, steps // 10)))


def steady_steps(steps: int, disturbed: Sequence[int] = ()) -> NDArray[np.bool_]:
    """Return which steps count, (steps,): those after the warm-up whose indices are not among `disturbed`."""
    steady = np.arange(steps) >= warmup(steps)
    steady[[index for index in disturbed if 0 <= index < steps]] = False
    return steady


@dataclass(frozen=True)
class SteadyState:
    """Step times in seconds after the warm-up."""

    seconds: Floats
    warmup_steps: int
    disturbed_steps: int = 0
    """Number of further steps that are left out, because one of them was profiled."""

    @classmethod
    def of(cls, seconds: Floats, period: int = 1, disturbed: Sequence[int] = ()) -> SteadyState:
        """Leave the warm-up and the steps with the indices `disturbed` out of `seconds`.

        If ranks synchronise once in `period` steps, take means over a period.
        """
        warmup_steps = warmup(len(seconds))
        steady = steady_steps(len(seconds), disturbed)
        kept = np.asarray(seconds, dtype=np.float64)[steady]
        return cls(rolling(kept, period), warmup_steps, len(seconds) - warmup_steps - len(kept))

    @property
    def median(self) -> float | None:
        """Median step time (s); None without steps."""
        return float(np.median(self.seconds)) if len(self.seconds) else None

    def quantile(self, fraction: float) -> float | None:
        """Return a quantile of the step times (s); None without steps."""
        return float(np.quantile(self.seconds, fraction)) if len(self.seconds) else None

    @property
    def reason(self) -> str | None:
        """Why no claim can be made from these steps; None if they are enough."""
        if len(self.seconds) < MIN_STEPS:
            needed = MIN_STEPS + self.warmup_steps + self.disturbed_steps
            return f"not enough steps ({len(self.seconds)} after the warm-up; run at least {needed})"
        return None

    def medians(self, seed: int = 0) -> Floats:
        """Return the bootstrap distribution of the median, shape [RESAMPLES]."""
        n = len(self.seconds)
        block = max(1, round(n ** (1 / 3)))
        random = np.random.default_rng(seed)
        starts = random.integers(0, n - block + 1, size=(RESAMPLES, -(-n // block)))
        index = (starts[..., None] + np.arange(block)).reshape(RESAMPLES, -1)[:, :n]
        return np.asarray(np.median(self.seconds[index], axis=1))


def ratio(numerator: SteadyState, denominator: SteadyState) -> tuple[float, float, float]:
    """Return the ratio of the two medians with its interval: (value, low, high). Both need enough steps."""
    assert numerator.median is not None
    assert denominator.median is not None
    ratios = numerator.medians(seed=1) / denominator.medians(seed=2)
    tail = (1 - CONFIDENCE) / 2
    return numerator.median / denominator.median, float(np.quantile(ratios, tail)), float(np.quantile(ratios, 1 - tail))


def rolling(values: Floats, period: int) -> Floats:
    """Return the means over each `period` consecutive values, (n - period + 1,), so that rare slow steps count.

    Fewer values than `period` give a single mean.
    """
    if period <= 1 or not len(values):
        return np.asarray(values, dtype=np.float64)
    period = min(period, len(values))
    cumulative = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return np.asarray((cumulative[period:] - cumulative[:-period]) / period)
