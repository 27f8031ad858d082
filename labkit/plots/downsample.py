"""Downsampling of lines to a maximum number of points: bin by bin, over the whole line."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MAX_POINTS = 2000


def extremes(x: NDArray[Any], y: Floats, max_points: int = MAX_POINTS) -> tuple[NDArray[Any], Floats]:
    """Return the lowest and the highest point of each bin, in order, and the first and the last point.

    The result is a selection of the given points with the same lowest and highest y. Values that are not finite count
    as gaps (NaN) and never hide a finite neighbour.
    """
    y = np.where(np.isfinite(y), y, np.nan)
    if len(y) <= max_points:
        return x, y
    width = -(-len(y) // ((max_points - 2) // 2))
    starts = np.arange(0, len(y), width)
    padded = np.full(len(starts) * width, np.nan)
    padded[: len(y)] = y
    bins = padded.reshape(-1, width)
    low = starts + np.argmin(np.where(np.isnan(bins), np.inf, bins), axis=1)
    high = starts + np.argmax(np.where(np.isnan(bins), -np.inf, bins), axis=1)
    index = np.sort(np.concatenate([[0], low, high, [len(y) - 1]]))
    index = index[np.diff(index, prepend=-1) > 0]
    return x[index], y[index]


def means(
    x: NDArray[Any], y: Floats, weight: Floats | None = None, max_points: int = MAX_POINTS
) -> tuple[Floats, Floats]:
    """Return the mean of each bin (weighted if `weight` is given); the first and the last x are kept."""
    x = np.asarray(x, dtype=np.float64)
    if len(y) <= max_points:
        return x, np.where(np.isfinite(y), y, np.nan)
    weight = np.ones(len(y)) if weight is None else np.asarray(weight, dtype=np.float64)
    finite = np.isfinite(y) & np.isfinite(weight)
    starts = np.array(_edges(len(y), max_points)[:-1])
    with np.errstate(invalid="ignore", divide="ignore"):
        total = np.add.reduceat(np.where(finite, weight, 0.0), starts)
        mean = np.add.reduceat(np.where(finite, y * weight, 0.0), starts) / total
    bin_x = np.add.reduceat(x, starts) / np.diff(np.append(starts, len(x)))
    bin_x[0], bin_x[-1] = x[0], x[-1]
    return bin_x, mean


def _edges(length: int, bins: int) -> list[int]:
    edges: list[int] = np.linspace(0, length, bins + 1).astype(int).tolist()
    return edges
