"""The buffers of two finished runs beside each other, from their last checkpoints: running means, counts, tables.

What a model keeps without training it decides what is evaluated and saved, and no loss shows it. A checkpoint does not
say which tensors are buffers; they are those of which the optimizer keeps nothing (frozen weights are among them).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labkit.experiment.tensor_files import load_arrays
from labkit.runs.run import Run

Array = NDArray[Any]


def buffer_difference(run: Run, reference: Run) -> tuple[float, str] | None:
    """The largest difference, relative above 1, and the name of that buffer; None where not both have a checkpoint.

    Infinite where a buffer is missing in one of them, has another shape, or is no number.
    """
    if not run.checkpoints() or not reference.checkpoints():
        return None
    one, other = (_untrained(each.directory.checkpoint(each.checkpoints()[-1])) for each in (run, reference))
    largest, where = 0.0, ""
    for name in sorted(one.keys() | other.keys()):
        difference = _between(one[name], other[name]) if name in one and name in other else float("inf")
        if difference > largest:
            largest, where = difference, name
    return largest, where


def _untrained(folder: Path) -> dict[str, Array]:
    kept = {
        key.removeprefix("state.").rpartition(".")[0]
        for path in folder.glob("optimizer*.safetensors")
        for key in load_arrays(path)
    }
    if not kept:  # an optimizer without memory: nothing tells weights and buffers apart
        return {}
    held: dict[str, Array] = {}
    for path in folder.glob("model*.safetensors"):
        held |= load_arrays(path)
    return {name: value for name, value in held.items() if name not in kept}


def _between(one: Array, other: Array) -> float:
    if one.shape != other.shape:
        return float("inf")
    if not one.size:
        return 0.0
    wide = np.complex128 if np.iscomplexobj(one) or np.iscomplexobj(other) else np.float64
    a, b = one.astype(wide), other.astype(wide)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(a - b) / np.maximum(1.0, np.abs(b)))
    return float(np.max(np.where(np.isnan(difference), np.inf, difference)))
