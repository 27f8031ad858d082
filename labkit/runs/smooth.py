"""Smoothing of curves by a running mean."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def smooth(y: Floats, window: int) -> Floats:
    """Return the mean over the finite ones of the last `window` values at each index; NaN where there is none."""
    finite = np.isfinite(y)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    stop = np.arange(1, len(y) + 1)
    start = np.maximum(0, stop - window)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (total[stop] - total[start]) / (count[stop] - count[start])
