"""Rows of the table while a run is in progress: the comparison of the ended runs, and an estimate for the active one.

The estimate refers to the latest comparable baseline that has ended; its interval is unknown until the run has ended.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from labkit.experiment import Experiment, ExperimentError
from labkit.experiment.run_directory import RunDirectory
from labkit.runs.comparison_row import ComparisonRow
from labkit.runs.data import RunData
from labkit.runs.methods import key, period
from labkit.runs.model_flops import model_flops_of
from labkit.runs.steady import SteadyState


@dataclass(frozen=True, kw_only=True)
class LiveRow(ComparisonRow):
    """The row of a run in progress: its figures so far."""

    live: bool = True
    """Always true: figures may still change."""


def comparison_rows(directories: Sequence[RunDirectory]) -> list[ComparisonRow]:
    """Return the rows of a comparison, without the runs that cannot be read."""
    from labkit.runs.compare import compare

    with contextlib.suppress(ExperimentError, FileNotFoundError, OSError):
        return list(compare(directories, skip_unreadable=True).rows)
    return []


def live_row(experiment: Experiment, data: RunData, rows: Sequence[ComparisonRow]) -> LiveRow | None:
    """Return the row of the active run, with its speed-up so far over the latest baseline in `rows`.

    None before its first step.
    """
    if not data.steps or not len(data.seconds[0]):
        return None
    steady = SteadyState.of(data.seconds[0].astype(np.float64), period(experiment), data.disturbed_steps)
    median = steady.median
    median = median if median is not None and np.isfinite(median) else None
    base = next((row.step_seconds for row in reversed(rows) if row.is_baseline and row.step_seconds), None)
    size = data.world_size
    speedup = base / median if base and median and not steady.reason and size > 1 else None
    ceiling = next((row.ceiling for row in reversed(rows) if row.is_ceiling and row.world_size == size), None)
    throughput = experiment.training.global_batch / median if median else None
    flops = model_flops_of(data, experiment, throughput)
    return LiveRow(
        run_id=data.directory.id,
        title=data.status.get("title") or experiment.title,
        workload=experiment.workload.name,
        layout=str(experiment.layout),
        method=key(experiment),
        world_size=size,
        device=experiment.launch.device,
        state=data.state,
        global_batch=experiment.training.global_batch,
        steps=data.steps,
        metric=data.metric.get("key"),
        final=None,
        loss=None,
        samples_per_second=throughput,
        model_flops_per_second=flops.per_second,
        mfu=flops.mfu,
        step_seconds=median,
        warmup_steps=None,
        speedup=None if experiment.launch.isolated else speedup,
        speedup_low=None,
        speedup_high=None,
        efficiency=None if speedup is None or experiment.launch.isolated else speedup / size,
        ceiling=ceiling,
        baseline_run_id=None,
        is_baseline=False,
        is_ceiling=experiment.launch.isolated and size > 1,
        notes=[],
    )
