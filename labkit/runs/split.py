"""Where the time of a step goes: data, computing, compressing, standing still for others, the optimizer.

The spans of a step hold the exchange of what ranks learned: the backward pass that of gradients, the optimizer's that
of weights. Taken out of them, it is a part of its own. Figures are rank 0's; where ranks draw their work, and wait
differently for each other, the mean over their pieces. All are medians after the warm-up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from labkit.experiment import Experiment
from labkit.runs.data import RunData
from labkit.runs.methods import SYNCHRONOUS, period
from labkit.runs.steady import Floats, rolling, warmup

MEASURED, CLOCK, MEAN = "measured", "by its CPU time", "mean, by DDP"
AROUND = 4
"""Of drawn work, means over so many pieces of each rank are looked at: some ranks wait where others never do."""
PARTS = ("data", "compute", "compression", "exposed", "optimizer")


@dataclass(frozen=True)
class Split:
    """Seconds of a step of one rank (of a piece, where ranks draw their work), by what they were for."""

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
    source: str = MEASURED
    """How it is known what was exposed."""

    @property
    def total(self) -> float:
        """The whole step."""
        return sum(getattr(self, part) or 0.0 for part in PARTS)


@dataclass(frozen=True)
class Columns:
    """The parts of each step (or piece) after the warm-up, (steps,) each."""

    data: Floats
    compute: Floats
    compression: Floats
    exposed: Floats | None
    optimizer: Floats
    source: str


def columns(data: RunData, experiment: Experiment | None) -> Columns | None:
    """The parts of rank 0's steps, or of all pieces; None before there is a step after the warm-up."""
    spans = {name: values.astype(np.float64) for name, values in data.spans.items()}
    exchanged = data.exchanged
    count = min(*map(len, spans.values()), *map(len, exchanged.values()))
    together = data.world_size if data.draws else 1
    first = warmup(count // together) * together
    spans = {name: values[first:count] for name, values in spans.items()}
    if count <= first or any(np.isnan(values).all() for values in spans.values()):
        return None
    compression = np.nan_to_num(exchanged["compression"][first:count])
    exposed, source = _exposed(data, exchanged["exposed"][first:count], spans, slice(first, count))
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
        source=source,
    )


def _exposed(data: RunData, measured: Floats, spans: dict[str, Floats], steps: slice) -> tuple[Floats | None, str]:
    """Exposed seconds of each step, and how they are known.

    DistributedDataParallel does not tell step by step. On CPUs a rank that waits does not compute, so the clock of its
    own computing tells; on GPUs there is DDP's mean over sampled steps.
    """
    if not np.isnan(measured).all():
        return np.nan_to_num(measured), MEASURED
    if data.world_size == 1:
        return np.zeros(len(measured)), MEASURED
    computed = data.compute[0][steps].astype(np.float64)
    on_cpu = str(data.rank_starts[0].get("device", "")).startswith("cpu")
    if on_cpu and len(computed) == len(measured) and not np.isnan(computed).all():
        idle = spans["data"] + spans["forward"] + spans["backward"] - computed
        return np.nan_to_num(np.clip(idle, 0.0, spans["backward"])), CLOCK
    mean = (data.communication or {}).get("exposed_seconds_per_step")
    return (None, "") if mean is None else (np.minimum(max(0.0, mean), spans["backward"]), MEAN)


def split(data: RunData, experiment: Experiment | None) -> Split | None:
    """Medians over the steps after the warm-up (over periods, where a method sends in some steps only)."""
    found = columns(data, experiment)
    if found is None:
        return None
    every = period(experiment) * (AROUND * data.world_size if data.draws else 1)

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
        source=found.source,
    )
