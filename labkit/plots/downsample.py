"""At most so many points a line: reduced bin by bin, never cut off."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MAX_POINTS = 2000


def extremes(x: NDArray[Any], y: Floats, most: int = MAX_POINTS) -> tuple[NDArray[Any], Floats]:
    """The smallest and the largest point of each bin, in order, with the first and the last point kept.

    The result is a selection of the given points whose lowest and highest y are those of the whole. Values that are
    not finite count as gaps (NaN) and never hide a finite neighbour.
    """
    y = np.where(np.isfinite(y), y, np.nan)
    if len(y) <= most:
        return x, y
    width = -(-len(y) // ((most - 2) // 2))
    starts = np.arange(0, len(y), width)
    room = np.full(len(starts) * width, np.nan)
    room[: len(y)] = y
    bins = room.reshape(-1, width)
    low = starts + np.argmin(np.where(np.isnan(bins), np.inf, bins), axis=1)
    high = starts + np.argmax(np.where(np.isnan(bins), -np.inf, bins), axis=1)
    index = np.sort(np.concatenate([[0], low, high, [len(y) - 1]]))
    index = index[np.diff(index, prepend=-1) > 0]
    return x[index], y[index]


def means(x: NDArray[Any], y: Floats, weight: Floats | None = None, most: int = MAX_POINTS) -> tuple[Floats, Floats]:
    """The mean of each bin (weighted, if `weight` is given), with the first and the last x kept."""
    x = np.asarray(x, dtype=np.float64)
    if len(y) <= most:
        return x, np.where(np.isfinite(y), y, np.nan)
    weight = np.ones(len(y)) if weight is None else np.asarray(weight, dtype=np.float64)
    known = np.isfinite(y) & np.isfinite(weight)
    starts = np.array(_edges(len(y), most)[:-1])
    with np.errstate(invalid="ignore", divide="ignore"):
        total = np.add.reduceat(np.where(known, weight, 0.0), starts)
        mean = np.add.reduceat(np.where(known, y * weight, 0.0), starts) / total
    at = np.add.reduceat(x, starts) / np.diff(np.append(starts, len(x)))
    at[0], at[-1] = x[0], x[-1]
    return at, mean


def _edges(length: int, bins: int) -> list[int]:
    edges: list[int] = np.linspace(0, length, bins + 1).astype(int).tolist()
    return edges
