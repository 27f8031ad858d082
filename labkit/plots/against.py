"""What a curve is drawn against: updates, samples, time or bytes. Methods differ in what they make of each."""

from __future__ import annotations

import numpy as np

from labkit.plots.downsample import Floats
from labkit.runs.data import RunData

TITLES = {
    "steps": "Step (updates done)",
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


def checked(against: str, *known: str) -> str:
    """`against`, if it is one of `known`; ValueError if not."""
    if against not in known:
        raise ValueError(f"against is one of {', '.join(known)}, got {against!r}")
    return against


def along(data: RunData, against: str) -> Floats:
    """How much of it each complete step had taken when it was done, (steps,); NaN where that is not known."""
    if against == "steps":
        return data.step.astype(np.float64)
    if against == "samples":
        return np.cumsum(data.samples, dtype=np.float64)
    if against == "time":
        return data.training_seconds
    sent = data.sent
    if np.isnan(sent).all():
        return np.full(len(sent), np.nan)
    return np.cumsum(np.nan_to_num(sent)) / MB


def at_steps(data: RunData, steps: Floats, against: str) -> Floats:
    """The same at given numbers of updates done; those that are not complete are not known."""
    if against == "steps":
        return steps
    along_all = along(data, against)
    index = steps.astype(np.int64) - data.first - 1
    known = (index >= 0) & (index < len(along_all))
    return np.where(
        known, along_all[np.clip(index, 0, max(0, len(along_all) - 1))] if len(along_all) else np.nan, np.nan
    )
