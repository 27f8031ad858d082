"""Where the time of a step goes: data, computation, compression, exposed communication and the optimizer.

The measured spans of a step include communication: of gradients in the backward pass, of weights in the optimizer's
span. Here it is subtracted from them and becomes a part of its own. The figures are those of rank 0 or, where ranks
take work from a queue and so wait differently, of the pieces of all ranks. All are medians after the warm-up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from labkit.experiment import Experiment
from labkit.experiment.update_rule import update_rule
from labkit.runs.data import RunData
from labkit.runs.methods import period
from labkit.runs.steady import Floats, rolling, warmup

MEASURED, BY_CPU_TIME, BY_DDP_MEAN = "measured", "by its CPU time", "mean, by DDP"
PIECES_PER_WINDOW = 4
"""With a work queue, medians are taken of means over this many pieces per rank: some ranks wait and others never do."""
PARTS = ("data", "compute", "compression", "exposed", "optimizer")


@dataclass(frozen=True)
class Split:
    """Seconds of a step of one rank (with a work queue: of a piece of work), by part."""

    data: float
    compute: float
    """Forward and backward pass without compression and exposed communication."""
    compression: float
    exposed: float | None
    """Communication during which nothing was computed; None if it was not measured and is contained in `compute`."""
    optimizer: float
    bytes: float | None
    """Bytes sent by one rank per step, the mean over the run; None if they were not counted."""
    formula_bytes: float | None
    """The same by the formula of the method; None if it has none."""
    source: str = MEASURED
    """How the exposed time was determined."""

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return sum(getattr(self, part) or 0.0 for part in PARTS)


@dataclass(frozen=True)
class Columns:
    """The parts of each step (or piece of work) after the warm-up, (steps,) each, in seconds."""

    data: Floats
    compute: Floats
    compression: Floats
    exposed: Floats | None
    optimizer: Floats
    source: str


def columns(data: RunData, experiment: Experiment | None) -> Columns | None:
    """Return the parts of rank 0's steps, or of all pieces of work; None before there is a step after the warm-up."""
    spans = {name: values.astype(np.float64) for name, values in data.spans.items()}
    exchanged = data.exchanged
    count = min(*map(len, spans.values()), *map(len, exchanged.values()))
    ranks = data.world_size if data.uses_work_queue else 1
    first = warmup(count // ranks) * ranks
    spans = {name: values[first:count] for name, values in spans.items()}
    if count <= first or any(np.isnan(values).all() for values in spans.values()):
        return None
    compression = np.nan_to_num(exchanged["compression"][first:count])
    exposed, source = _exposed(data, exchanged["exposed"][first:count], spans, slice(first, count))
    compute, optimizer = spans["forward"] + spans["backward"], spans["optimizer"]
    communication = compression + (exposed if exposed is not None else 0.0)
    synchronous = experiment is None or update_rule(experiment).is_synchronous
    # Weights are communicated in the optimizer's span, gradients in the backward pass (post-local SGD does one, then
    # the other).
    in_optimizer = np.zeros(len(communication), bool) if synchronous else communication <= optimizer
    return Columns(
        data=spans["data"],
        compute=np.maximum(0.0, compute - np.where(in_optimizer, 0.0, communication)),
        compression=compression,
        exposed=exposed,
        optimizer=np.maximum(0.0, optimizer - np.where(in_optimizer, communication, 0.0)),
        source=source,
    )


def _exposed(data: RunData, measured: Floats, spans: dict[str, Floats], steps: slice) -> tuple[Floats | None, str]:
    """Return the exposed seconds of each step and how they were determined.

    DistributedDataParallel does not report them per step. On CPUs a waiting rank uses no CPU time, so they follow from
    the rank's CPU time; on GPUs there is DDP's mean over sampled steps.
    """
    if not np.isnan(measured).all():
        return np.nan_to_num(measured), MEASURED
    if data.world_size == 1:
        return np.zeros(len(measured)), MEASURED
    computed = data.compute[0][steps].astype(np.float64)
    on_cpu = str(data.rank_starts[0].get("device", "")).startswith("cpu")
    if on_cpu and len(computed) == len(measured) and not np.isnan(computed).all():
        idle = spans["data"] + spans["forward"] + spans["backward"] - computed
        return np.nan_to_num(np.clip(idle, 0.0, spans["backward"])), BY_CPU_TIME
    mean = (data.communication or {}).get("exposed_seconds_per_step")
    return (None, "") if mean is None else (np.minimum(max(0.0, mean), spans["backward"]), BY_DDP_MEAN)


def split(data: RunData, experiment: Experiment | None) -> Split | None:
    """Return the medians over the steps after the warm-up, or over means of a period if not every step communicates."""
    parts = columns(data, experiment)
    if parts is None:
        return None
    window = period(experiment) * (PIECES_PER_WINDOW * data.world_size if data.uses_work_queue else 1)

    def typical(values: Floats) -> float:
        return float(np.nanmedian(rolling(np.nan_to_num(values), window)))

    communication = data.communication or {}
    bytes_per_step = data.exchanged["bytes"]
    mean_bytes = None if np.isnan(bytes_per_step).all() else float(np.nanmean(bytes_per_step))
    return Split(
        data=typical(parts.data),
        compute=typical(parts.compute),
        compression=typical(parts.compression),
        exposed=None if parts.exposed is None else typical(parts.exposed),
        optimizer=typical(parts.optimizer),
        bytes=communication.get("counted_bytes_per_step", mean_bytes),
        formula_bytes=communication.get("formula_bytes_per_step"),
        source=parts.source,
    )
