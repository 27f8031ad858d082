"""The precision and the values with which the layers of a run compute, from its events (training/probes/layers.py).

The events are untrusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labkit.runs.checked import between, integer

MAX_BINS = 1025
MAX_DIMENSIONS = 8
MAX_SIZE = 2**48


@dataclass(frozen=True)
class Side:
    """One operand of a product: the inputs or the weights."""

    kind: str
    """Number format: `float32`, `int8`, `ternary`, `int4 grid`, …"""
    factor: str
    """The dtype in which they reach the product."""
    zeros: float
    """Fraction that is zero."""
    share: str
    """What shares one scale: `layer`, `row`, `token`, `32 inputs`."""
    numbers: int
    """Number of elements."""
    counts: NDArray[np.int64]
    """Histogram of the sampled elements over bins from -1 to 1, relative to the largest magnitude that shares their
    scale; the number of bins is odd, and the middle one is zero.
    """


@dataclass(frozen=True)
class Layer:
    """A layer with a matrix product; dtypes are named as torch names them."""

    name: str
    stage: int
    """Pipeline stage."""
    shape: tuple[int, ...]
    """Shape of the weight, or of the shard that the reporting rank multiplies."""
    part: str
    """Which shard that is; empty if it is the full weight."""
    stored: str
    """Dtype of the weight."""
    answers: str
    """Dtype of the output."""
    input: Side
    weight: Side

    @property
    def multiplied(self) -> str:
        """`int8 × ternary`: inputs × weights."""
        return f"{self.input.kind} × {self.weight.kind}"


def read(rows: Any, limit: int) -> list[Layer]:
    """Return at most `limit` layers of an event; rows that cannot be read are left out."""
    layers = [_layer(row) for row in rows[:limit]] if isinstance(rows, list) else []
    return [layer for layer in layers if layer is not None]


def group_by_operands(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """Return the layers grouped by what they multiply (`int8 × ternary`)."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.multiplied, []).append(layer)
    return groups


def _layer(row: Any) -> Layer | None:
    if not isinstance(row, dict):
        return None
    words = {name: _word(row.get(name)) for name in ("name", "part", "stored", "answers")}
    shape, stage = row.get("shape"), integer(row.get("stage"), 0, 4096)
    sizes = [integer(size, 0, MAX_SIZE) for size in shape[:MAX_DIMENSIONS]] if isinstance(shape, list) else []
    sides = [_side(row.get(name)) for name in ("input", "weight")]
    if not words["name"] or stage is None or None in sizes or sides[0] is None or sides[1] is None:
        return None
    dimensions = tuple(size for size in sizes if size is not None)
    return Layer(words["name"], stage, dimensions, words["part"], words["stored"], words["answers"], sides[0], sides[1])


def _side(value: Any) -> Side | None:
    if not isinstance(value, dict):
        return None
    zeros, numbers = between(value.get("zeros"), 0, 1), integer(value.get("numbers"), 0, MAX_SIZE)
    counts = value.get("counts")
    if zeros is None or numbers is None or not isinstance(counts, list) or not len(counts) % 2:
        return None
    if len(counts) > MAX_BINS:
        return None
    checked = [integer(count, 0, 2**40) for count in counts]
    if None in checked:
        return None
    kind, factor, share = (_word(value.get(name)) for name in ("kind", "factor", "share"))
    return Side(kind, factor, zeros, share, numbers, np.array(checked, dtype=np.int64))


def _word(value: Any) -> str:
    return value[:200] if isinstance(value, str) else ""
