"""The x axis of a curve: optimizer steps, samples, time or bytes."""

from __future__ import annotations

import numpy as np

from labkit.plots.downsample import Floats
from labkit.runs.data import RunData

TITLES = {
    "steps": "Optimizer step",
    "samples": "Samples seen",
    "time": "Training time (s, without evaluations)",
    "bytes": "Sent by all ranks (MB)",
}
HOVER = {
    "steps": "step %{x:,.0f}",
    "samples": "%{x:,.0f} samples",
    "time": "%{x:.3~g} s",
    "bytes": "%{x:.3~g} MB",
}
MB = 2**20


def checked_x_axis(x_axis: str, *allowed: str) -> str:
    """Return `x_axis` if it is one of `allowed`; raise ValueError if not."""
    if x_axis not in allowed:
        raise ValueError(f"x_axis is one of {', '.join(allowed)}, got {x_axis!r}")
    return x_axis


def x_values(data: RunData, x_axis: str) -> Floats:
    """Return the x value at the end of each complete step, (steps,); NaN where it is unknown."""
    if x_axis == "steps":
        return data.step.astype(np.float64)
    if x_axis == "samples":
        return np.cumsum(data.samples, dtype=np.float64)
    if x_axis == "time":
        return data.training_seconds
    sent = data.sent
    if np.isnan(sent).all():
        return np.full(len(sent), np.nan)
    return np.cumsum(np.nan_to_num(sent)) / MB


def x_at_steps(data: RunData, steps: Floats, x_axis: str) -> Floats:
    """Return the x values after the given numbers of optimizer steps; NaN for steps that are not complete."""
    if x_axis == "steps":
        return steps
    values = x_values(data, x_axis)
    index = steps.astype(np.int64) - data.first - 1
    valid = (index >= 0) & (index < len(values))
    return np.where(valid, values[np.clip(index, 0, max(0, len(values) - 1))] if len(values) else np.nan, np.nan)
