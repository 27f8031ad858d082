"""All figures of runs apart from their curves, in the order in which they are shown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from labkit.plots import break_even, traced
from labkit.plots.experts import experts
from labkit.plots.exported import exported
from labkit.plots.gpus import gpus
from labkit.plots.memory import memory
from labkit.plots.numbers import formats, layers
from labkit.plots.pareto import pareto
from labkit.plots.picture import Picture
from labkit.plots.quantized import quantized
from labkit.plots.schedules import schedules
from labkit.plots.shown import LabeledRun, labeled_runs
from labkit.plots.sparsity import sparse_layers, sparsity
from labkit.plots.split import split
from labkit.plots.staleness import staleness
from labkit.plots.three_numbers import three_numbers
from labkit.plots.timeline import timeline
from labkit.plots.tradeoff import tradeoff
from labkit.plots.traffic import communication
from labkit.runs.dense import is_dense
from labkit.runs.methods import is_plain

MIN_RUNS = 4
"""Minimum number of runs for a Pareto front."""


def detail_figures(runs: Iterable[Any] | Any) -> list[Picture]:
    """Return the figures of traced steps: memory, traffic, schedules of several pipelines, timelines, experts."""
    labeled = [run for run in labeled_runs(runs) if run.data.memory and not run.is_ceiling]
    pipelines = [run for run in labeled if traced.bubble_of(run) is not None]
    with_traffic = [run for run in labeled if run.data.traffic]
    figures = [memory(labeled)] if labeled else []
    if with_traffic:
        figures.append(communication(with_traffic))
    if len(pipelines) > 1:
        figures.append(schedules(pipelines))
    figures += [timeline(run) for run in pipelines]
    return figures + [experts(run) for run in labeled if any(load.sum() for load in run.data.experts.values())]


def gpu_figures(runs: Iterable[Any] | Any) -> list[Picture]:
    """Return a figure of the GPUs of each run that has figures of them."""
    return [gpus(run) for run in labeled_runs(runs) if any(history.records for history in run.data.gpus)]


def sparsity_figures(runs: Iterable[Any] | Any) -> list[Picture]:
    """Return the figures of sparse runs: sparsity over time, the layers of each run, and exported networks."""
    labeled = [run for run in labeled_runs(runs) if run.data.sparsity and not run.is_ceiling]
    figures = [sparsity(labeled), *map(sparse_layers, labeled)] if labeled else []
    with_export = [run for run in labeled if run.data.exported.get("latency_seconds")]
    return figures + ([exported(with_export)] if with_export else [])


def precision_figures(runs: Iterable[Any] | Any) -> list[Picture]:
    """Return the figures about precision: speed-ups, histograms and layers of sparse or low-precision runs.

    Networks that were quantized after their training follow.
    """
    all_runs = labeled_runs(runs)
    labeled = [run for run in all_runs if run.data.numbers and not run.is_ceiling]
    not_dense = [run for run in labeled if run.experiment is not None and not is_dense(run.experiment)]
    figures: list[Picture] = []
    if not_dense:
        speedups = three_numbers(labeled)
        figures = [*([speedups] if speedups.rows else []), formats(labeled), *map(layers, not_dense)]
    converted = [run for run in all_runs if run.data.quantized.get("latency_seconds")]
    return figures + ([quantized(converted)] if converted else [])


def cost_figures(runs: Iterable[Any] | Any) -> list[Picture]:
    """Return the Pareto fronts of accuracy against time and against memory, if there are enough runs."""
    labeled = [run for run in labeled_runs(runs) if not run.is_ceiling]
    if len(labeled) < MIN_RUNS:
        return []
    return [picture for cost in ("time", "memory") if (picture := pareto(labeled, cost)).rows]


def method_figures(runs: Iterable[Any] | Any) -> list[Picture]:
    """Return the figures about gradient methods: trade-off, split of the step time, break-even rate and staleness.

    Empty if every run averages gradients plainly over the machine's own link.
    """
    labeled = [run for run in labeled_runs(runs) if run.data.steps and not run.is_ceiling]
    if not any(has_method_figures(run) for run in labeled):
        return []
    figures = [tradeoff(labeled)] if len(labeled) > 1 else []
    steps = split(labeled)
    if steps.rows:
        figures.append(steps)
    if break_even.applies(labeled):
        figures.append(break_even.break_even(labeled))
    return figures + ([staleness(labeled)] if any(run.data.staleness.sum() for run in labeled) else [])


def has_method_figures(run: LabeledRun) -> bool:
    """Return whether the run has a gradient method or an emulated link that `method_figures` shows."""
    experiment = run.experiment
    if experiment is None or run.world_size < 2:
        return False
    return not is_plain(experiment) or experiment.launch.network is not None
