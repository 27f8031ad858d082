"""Speed-ups of sparse and low-precision layers: in theory, and as measured (training/after/kernels.py); untrusted.

In theory the time of a matrix product is proportional to its multiplications by non-zero weights times the bytes per
element, compared with those of a dense float32 product. A layer has three products: forward and one for each gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from labkit.runs.checked import between, integer

MAX_KINDS = 64
FLOAT32_BYTES = 4
"""Bytes per element of the dense product."""


@dataclass(frozen=True)
class Kind:
    """Layers of the same shape, operands and sparsity."""

    layers: tuple[str, ...]
    """Names of the layers, or the first of them."""
    count: int
    """Number of such layers in the network."""
    shape: tuple[int, ...]
    rows: int
    """Input vectors per training pass that the weight is multiplied with."""
    multiplied: str
    """`int8 × ternary`: inputs × weights."""
    weights: int
    """Number of weights of a layer."""
    nonzero: float
    """Number of non-zero weights, the mean over the layers."""
    sparse: tuple[bool, bool, bool]
    """Whether a product skips zeros: forward, for the gradient of the inputs, for that of the weight."""
    bytes: tuple[float, float, float]
    """Bytes per element: forward, for the gradient of the inputs, for that of the weight."""
    dense_seconds: float | None
    """Time of a dense float32 pass, forward and backward; None if it was not measured."""
    seconds: float | None
    """Time of the same pass of the layer as the run has it; None if it was not measured."""
    measured: float
    """Fraction of the rows on which both were measured."""

    @property
    def dense_flops(self) -> float:
        """FLOPs of a dense forward and backward pass of one layer."""
        return 6.0 * self.rows * self.weights

    @property
    def flops(self) -> tuple[float, float, float]:
        """FLOPs of each of the three products, without the zeros that it skips."""
        forward, of_inputs, of_weight = (self.nonzero if sparse else self.weights for sparse in self.sparse)
        return 2.0 * self.rows * forward, 2.0 * self.rows * of_inputs, 2.0 * self.rows * of_weight

    @property
    def theory(self) -> float | None:
        """Theoretical speed-up over dense float32; None if every weight is zero."""
        return theory([self])

    @property
    def kernel(self) -> float | None:
        """Measured speed-up over dense float32; None if it was not measured."""
        return kernel([self])


def theory(kinds: Sequence[Kind]) -> float | None:
    """Return the theoretical speed-up over dense float32 of all layers of these kinds; None if every weight is zero."""
    dense_cost = sum(kind.count * kind.dense_flops * FLOAT32_BYTES for kind in kinds)
    cost = sum(kind.count * flops * size for kind in kinds for flops, size in zip(kind.flops, kind.bytes, strict=True))
    return dense_cost / cost if dense_cost and cost else None


def kernel(kinds: Sequence[Kind]) -> float | None:
    """Return the measured speed-up over dense float32 of all layers that were measured; None if none was."""
    measured = [
        (kind.count / kind.measured * kind.dense_seconds, kind.count / kind.measured * kind.seconds)
        for kind in kinds
        if kind.dense_seconds and kind.seconds
    ]
    kernel_seconds = sum(seconds for _, seconds in measured)
    return sum(seconds for seconds, _ in measured) / kernel_seconds if kernel_seconds else None


def read(rows: Any) -> list[Kind]:
    """Return the kinds of layers in an event; rows that cannot be read are left out."""
    kinds = [_kind(row) for row in rows[:MAX_KINDS]] if isinstance(rows, list) else []
    return [kind for kind in kinds if kind is not None]


def _sparse(value: Any) -> tuple[bool, bool, bool]:
    if not isinstance(value, list) or len(value) != 3:
        return True, True, True
    forward, of_inputs, of_weight = (each is not False for each in value)
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
    dimensions = [integer(size, 0, 2**48) for size in shape[:8]]
    bytes_each = [between(size, 0.125, 64) for size in sizes]
    if count is None or rows is None or weights is None or nonzero is None or None in dimensions or None in bytes_each:
        return None
    forward, of_inputs, of_weight = (size or 0.0 for size in bytes_each)
    return Kind(
        tuple(str(name)[:200] for name in names[:16]),
        count,
        tuple(size for size in dimensions if size is not None),
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
