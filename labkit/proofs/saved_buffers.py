"""Compares the buffers of two finished runs, from their last checkpoints: running means, counts, tables.

Tensors that a model keeps without training them affect what is evaluated and saved, but not the loss. A checkpoint does
not mark buffers; they are the tensors without optimizer state (which includes frozen weights).
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
    """Return the largest difference (relative above 1) and the name of that buffer; None unless both have a checkpoint.

    The difference is infinite if a buffer is missing in one of them, has another shape, or is NaN in one only.
    """
    if not run.checkpoints() or not reference.checkpoints():
        return None
    arrays, expected = (
        _untrained_arrays(each.directory.checkpoint(each.checkpoints()[-1])) for each in (run, reference)
    )
    largest, buffer = 0.0, ""
    for name in sorted(arrays.keys() | expected.keys()):
        difference = (
            _max_difference(arrays[name], expected[name]) if name in arrays and name in expected else float("inf")
        )
        if difference > largest:
            largest, buffer = difference, name
    return largest, buffer


def _untrained_arrays(folder: Path) -> dict[str, Array]:
    """Return the tensors of a checkpoint that have no optimizer state, by name."""
    trained = {
        key.removeprefix("state.").rpartition(".")[0]
        for path in folder.glob("optimizer*.safetensors")
        for key in load_arrays(path)
    }
    if not trained:  # an optimizer without state: weights and buffers cannot be distinguished
        return {}
    tensors: dict[str, Array] = {}
    for path in folder.glob("model*.safetensors"):
        tensors |= load_arrays(path)
    return {name: value for name, value in tensors.items() if name not in trained}


def _max_difference(array: Array, expected: Array) -> float:
    """Return the largest difference of two arrays, relative above 1; infinite for other shapes or a one-sided NaN."""
    if array.shape != expected.shape:
        return float("inf")
    if not array.size:
        return 0.0
    wide = np.complex128 if np.iscomplexobj(array) or np.iscomplexobj(expected) else np.float64
    a, b = array.astype(wide), expected.astype(wide)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(a - b) / np.maximum(1.0, np.abs(b)))
    return float(np.max(np.where(np.isnan(difference), np.inf, difference)))
