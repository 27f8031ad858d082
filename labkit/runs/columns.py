"""Columns of numbers that grow while a run is read: one element per step, or per piece of work."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labkit.experiment.events import MAX_STEPS
from labkit.runs.checked import number

Floats = NDArray[np.float64]


class GrowingArray:
    """A one-dimensional array that doubles its capacity as it grows."""

    def __init__(self, dtype: Any) -> None:
        self._capacity: NDArray[Any] = np.zeros(256, dtype)
        self.length = 0

    def extend_to(self, length: int, fill: float) -> None:
        """Grow to `length` elements; the new ones are `fill`."""
        if length > len(self._capacity):
            larger = np.empty(max(length, min(2 * len(self._capacity), MAX_STEPS)), self._capacity.dtype)
            larger[: self.length] = self._capacity[: self.length]
            self._capacity = larger
        if length > self.length:
            self._capacity[self.length : length] = fill
            self.length = length

    def write(self, first: int, values: NDArray[Any], fill: float) -> None:
        """Write `values` from index `first` on; elements skipped on the way become `fill`."""
        self.extend_to(first + len(values), fill)
        self._capacity[first : first + len(values)] = values

    def add(self, first: int, values: NDArray[Any]) -> None:
        """Add `values` to the elements from index `first` on; new elements start at zero."""
        self.extend_to(first + len(values), 0)
        self._capacity[first : first + len(values)] += values

    def add_at(self, indices: NDArray[np.int64], values: NDArray[Any]) -> None:
        """Add each of `values` at its index in `indices`, which may repeat; new elements start at zero."""
        self.extend_to(int(indices.max()) + 1, 0)
        np.add.at(self._capacity, indices, values)

    @property
    def values(self) -> NDArray[Any]:
        """A read-only view of the elements written so far."""
        view = self._capacity[: self.length]
        view.flags.writeable = False
        return view


def column(values: Any, count: int | None = None) -> Floats | None:
    """Return a list of numbers as an array; None for anything else, or for another length than `count`.

    `null` and what is not a number become NaN.
    """
    if not isinstance(values, list) or (count is not None and len(values) != count):
        return None
    if not values:
        return np.zeros(0)
    try:
        array = np.array(values)
    except ValueError:  # a ragged list
        array = np.empty(0, dtype=object)
    if array.ndim == 1 and array.dtype.kind in "fiu" and len(array) == len(values):
        return array.astype(np.float64)
    return np.array([_finite_or_nan(value) for value in values])


def _finite_or_nan(value: Any) -> float:
    checked = number(value)
    return math.nan if checked is None else checked


def counts(values: Floats) -> Floats:
    """Return values as counts: what is not a number between 0 and 1e18 becomes 0."""
    return np.nan_to_num(np.clip(values, 0, 1e18), nan=0.0)


def as_float32(values: Floats) -> NDArray[np.float32]:
    """Return values as float32; what does not fit becomes infinite, without a warning."""
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(np.float32)
