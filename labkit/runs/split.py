"""Where the time of a step goes: data, computing, compressing, standing still for others, the optimizer.

The spans of a step hold the exchange of what ranks learned: the backward pass that of gradients, the optimizer's that
of weights. Taken out of them, it is a part of its own. Figures are rank 0's, medians after the warm-up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from labkit.experiment import Experiment
from labkit.runs.data import RunData
from labkit.runs.methods import SYNCHRONOUS, period
from labkit.runs.steady import Floats, rolling, warmup

PARTS = ("data", "compute", "compression", "exposed", "optimizer")


@dataclass(frozen=True)
class Split:
    """Seconds of one step (of one piece, where ranks draw their work), by what they were for."""

    data: float
    compute: float
    """Forward and backward, without what follows."""
    compression: float
    exposed: float | None
    """Nothing was computed while something travelled; None where that was not measured, and `compute` holds it."""
    optimizer: float
    bytes: float | None
    """Sent by one rank per step, the mean over the run; None where nobody counted."""
    formula_bytes: float | None
    """What the formula of the method says of the same steps; None where there is none."""
    estimated: bool = False
    """Exposed time is DistributedDataParallel's own mean over sampled steps, not measured step by step."""

    @property
    def total(self) -> float:
        """The whole step."""
        return sum(getattr(self, part) or 0.0 for part in PARTS)


@dataclass(frozen=True)
class Columns:
    """The parts of each step after the warm-up, (steps,) each."""

    data: Floats
    compute: Floats
    compression: Floats
    exposed: Floats | None
    optimizer: Floats
    estimated: bool


def columns(data: RunData, experiment: Experiment | None) -> Columns | None:
    """The parts of rank 0's steps; None before there is a step after the warm-up."""
    spans = {name: values.astype(np.float64) for name, values in data.spans.items()}
    exchanged = data.exchanged
    count = min(*map(len, spans.values()), *map(len, exchanged.values()))
    first = warmup(count)
    spans = {name: values[first:count] for name, values in spans.items()}
    if count <= first or any(np.isnan(values).all() for values in spans.values()):
        return None
    compression = np.nan_to_num(exchanged["compression"][first:count])
    exposed, estimated = _exposed(data, exchanged["exposed"][first:count])
    computing, optimizer = spans["forward"] + spans["backward"], spans["optimizer"]
    taken = compression + (exposed if exposed is not None else 0.0)
    synchronous = experiment is None or experiment.gradients.update.method == SYNCHRONOUS
    # Weights are exchanged beside the optimizer, gradients in the backward pass (post-local SGD does both in turn).
    beside = np.zeros(len(taken), bool) if synchronous else taken <= optimizer
    return Columns(
        data=spans["data"],
        compute=np.maximum(0.0, computing - np.where(beside, 0.0, taken)),
        compression=compression,
        exposed=exposed,
        optimizer=np.maximum(0.0, optimizer - np.where(beside, taken, 0.0)),
        estimated=estimated,
    )


def _exposed(data: RunData, measured: Floats) -> tuple[Floats | None, bool]:
    """Exposed seconds of each step, and whether that is only a mean over the run."""
    if not np.isnan(measured).all():
        return np.nan_to_num(measured), False
    if data.world_size == 1:
        return np.zeros(len(measured)), False
    mean = (data.communication or {}).get("exposed_seconds_per_step")
    return (None, False) if mean is None else (np.full(len(measured), max(0.0, mean)), True)


def split(data: RunData, experiment: Experiment | None) -> Split | None:
    """Medians over the steps after the warm-up (over periods, where a method sends in some steps only)."""
    found = columns(data, experiment)
    if found is None:
        return None
    every = period(experiment)

    def middle(values: Floats) -> float:
        return float(np.nanmedian(rolling(np.nan_to_num(values), every)))

    told = data.communication or {}
    sent = data.exchanged["bytes"]
    mean = None if np.isnan(sent).all() else float(np.nanmean(sent))
    return Split(
        data=middle(found.data),
        compute=middle(found.compute),
        compression=middle(found.compression),
        exposed=None if found.exposed is None else middle(found.exposed),
        optimizer=middle(found.optimizer),
        bytes=told.get("counted_bytes_per_step", mean),
        formula_bytes=told.get("formula_bytes_per_step"),
        estimated=found.estimated,
    )
