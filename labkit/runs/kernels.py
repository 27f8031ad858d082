"""What sparse and narrow layers promise in theory, and what their kernels gave (training/after/kernels.py); untrusted.

In theory a product takes as long as its multiplications with weights that are not zero, times the bytes of a number,
take beside those of a dense product in float32: a layer has three of them, forward and for both gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from labkit.runs.checked import between, integer

MOST_KINDS = 64
FLOAT32 = 4
"""Bytes of a number of the dense product."""


@dataclass(frozen=True)
class Kind:
    """Layers that are alike."""

    layers: tuple[str, ...]
    """Their names, or the first of them."""
    count: int
    shape: tuple[int, ...]
    rows: int
    """Vectors that the weight is multiplied with in a pass in training."""
    multiplied: str
    """`int8 × ternary`: inputs × weights."""
    weights: int
    nonzero: float
    """Weights that are not zero, the mean over the layers."""
    sparse: tuple[bool, bool, bool]
    """Does a product (forward, for the gradient of the inputs, of the weight) leave zeros out?"""
    bytes: tuple[float, float, float]
    """Of a number: forward, for the gradient of the inputs, for that of the weight."""
    dense_seconds: float | None
    """Of a dense pass in float32, forward and backward; None if it was not measured."""
    seconds: float | None
    """Of the layer as the run has it."""
    measured: float
    """On which part of the rows both were measured."""

    @property
    def dense_flops(self) -> float:
        """Of a dense pass forward and backward of one layer."""
        return 6.0 * self.rows * self.weights

    @property
    def flops(self) -> tuple[float, float, float]:
        """Of each product, without the zeros that it leaves out."""
        forward, of_inputs, of_weight = (self.nonzero if sparse else self.weights for sparse in self.sparse)
        return 2.0 * self.rows * forward, 2.0 * self.rows * of_inputs, 2.0 * self.rows * of_weight

    @property
    def theory(self) -> float | None:
        """So many times as fast as dense in float32; None where no weight is left."""
        return theory([self])

    @property
    def kernel(self) -> float | None:
        """So many times as fast as measured."""
        return kernel([self])


def theory(kinds: Sequence[Kind]) -> float | None:
    """Of all these layers together, as often as they stand in the network."""
    dense = sum(kind.count * kind.dense_flops * FLOAT32 for kind in kinds)
    own = sum(kind.count * flops * size for kind in kinds for flops, size in zip(kind.flops, kind.bytes, strict=True))
    return dense / own if dense and own else None


def kernel(kinds: Sequence[Kind]) -> float | None:
    """The same as measured, of those that were."""
    known = [
        (kind.count / kind.measured * kind.dense_seconds, kind.count / kind.measured * kind.seconds)
        for kind in kinds
        if kind.dense_seconds and kind.seconds
    ]
    own = sum(seconds for _, seconds in known)
    return sum(seconds for seconds, _ in known) / own if own else None


def read(rows: Any) -> list[Kind]:
    """The kinds of an event that can be read."""
    found = [_kind(row) for row in rows[:MOST_KINDS]] if isinstance(rows, list) else []
    return [kind for kind in found if kind is not None]


def _sparse(found: Any) -> tuple[bool, bool, bool]:
    if not isinstance(found, list) or len(found) != 3:
        return True, True, True
    forward, of_inputs, of_weight = (one is not False for one in found)
    return forward, of_inputs, of_weight


def _kind(row: Any) -> Kind | None:
    if not isinstance(row, dict):
        return None
    names, shape, sizes = row.get("layers"), row.get("shape"), row.get("bytes")
    if not (isinstance(names, list) and isinstance(shape, list) and isinstance(sizes, list) and len(sizes) == 3):
        return None
    count, rows = integer(row.get("count"), 1, 2**20), integer(row.get("rows"), 1, 2**40)
    weights = integer(row.get("weights"), 1, 2**48)
    nonzero = between(row.get("nonzero"), 0, weights or 0)
    whole = [integer(size, 0, 2**48) for size in shape[:8]]
    each = [between(size, 0.125, 64) for size in sizes]
    if count is None or rows is None or weights is None or nonzero is None or None in whole or None in each:
        return None
    forward, of_inputs, of_weight = (size or 0.0 for size in each)
    return Kind(
        tuple(str(name)[:200] for name in names[:16]),
        count,
        tuple(size for size in whole if size is not None),
        rows,
        row["multiplied"][:200] if isinstance(row.get("multiplied"), str) else "",
        weights,
        nonzero,
        _sparse(row.get("sparse")),
        (forward, of_inputs, of_weight),
        between(row.get("dense_seconds"), 1e-9, 1e6),
        between(row.get("seconds"), 1e-9, 1e6),
        between(row.get("measured"), 1e-9, 1) or 1.0,
    )
