"""What numbers the layers of a run compute with, as its ranks wrote it down (training/probes/layers.py); untrusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labkit.runs.checked import between, integer

MOST_BINS = 1025
MOST_DIMENSIONS = 8
MOST_SIZE = 2**48


@dataclass(frozen=True)
class Side:
    """One side of a product: the inputs, or the weights."""

    kind: str
    """What numbers they are: `float32`, `int8`, `ternary`, `int4 grid`, …"""
    factor: str
    """The type in which they reached the product."""
    zeros: float
    """Which part of them is zero."""
    share: str
    """Which of them have one scale: `layer`, `row`, `token`, `32 inputs`."""
    numbers: int
    """How many there are."""
    counts: NDArray[np.int64]
    """How many of those looked at lie in each of the bins from -1 to 1, relative to the largest magnitude of what has
    one scale; an odd number of bins, the middle one is zero.
    """


@dataclass(frozen=True)
class Layer:
    """A layer with a product; types as torch names them."""

    name: str
    stage: int
    """Of the pipeline."""
    shape: tuple[int, ...]
    """Of the weight, as far as the rank that saw it multiplies it."""
    part: str
    """Which part that is; empty where it is the whole."""
    stored: str
    """Type of the weight."""
    answers: str
    """Type of the output."""
    input: Side
    weight: Side

    @property
    def multiplied(self) -> str:
        """`int8 × ternary`: inputs × weights."""
        return f"{self.input.kind} × {self.weight.kind}"


def read(rows: Any, most: int) -> list[Layer]:
    """The layers of an event that can be read, `most` at most."""
    found = [_layer(row) for row in rows[:most]] if isinstance(rows, list) else []
    return [layer for layer in found if layer is not None]


def together(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """Layers by what is multiplied in them."""
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        found.setdefault(layer.multiplied, []).append(layer)
    return found


def _layer(row: Any) -> Layer | None:
    if not isinstance(row, dict):
        return None
    words = {name: _word(row.get(name)) for name in ("name", "part", "stored", "answers")}
    shape, stage = row.get("shape"), integer(row.get("stage"), 0, 4096)
    sizes = [integer(size, 0, MOST_SIZE) for size in shape[:MOST_DIMENSIONS]] if isinstance(shape, list) else []
    sides = [_side(row.get(name)) for name in ("input", "weight")]
    if not words["name"] or stage is None or None in sizes or sides[0] is None or sides[1] is None:
        return None
    known = tuple(size for size in sizes if size is not None)
    return Layer(words["name"], stage, known, words["part"], words["stored"], words["answers"], sides[0], sides[1])


def _side(value: Any) -> Side | None:
    if not isinstance(value, dict):
        return None
    zeros, numbers = between(value.get("zeros"), 0, 1), integer(value.get("numbers"), 0, MOST_SIZE)
    counts = value.get("counts")
    if zeros is None or numbers is None or not isinstance(counts, list) or not len(counts) % 2:
        return None
    if len(counts) > MOST_BINS:
        return None
    whole = [integer(count, 0, 2**40) for count in counts]
    if None in whole:
        return None
    kind, factor, share = (_word(value.get(name)) for name in ("kind", "factor", "share"))
    return Side(kind, factor, zeros, share, numbers, np.array(whole, dtype=np.int64))


def _word(value: Any) -> str:
    return value[:200] if isinstance(value, str) else ""
