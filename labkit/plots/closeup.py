"""All pictures that runs give beside their curves, in the order in which one would look at them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from labkit.plots import break_even, traced
from labkit.plots.experts import experts
from labkit.plots.exported import exported
from labkit.plots.memory import memory
from labkit.plots.numbers import formats, layers
from labkit.plots.pareto import pareto
from labkit.plots.picture import Picture
from labkit.plots.quantized import quantized
from labkit.plots.schedules import schedules
from labkit.plots.shown import LabeledRun, shown
from labkit.plots.sparsity import sparse_layers, sparsity
from labkit.plots.split import split
from labkit.plots.staleness import staleness
from labkit.plots.three_numbers import three_numbers
from labkit.plots.timeline import timeline
from labkit.plots.tradeoff import tradeoff
from labkit.plots.traffic import communication
from labkit.runs.dense import is_dense
from labkit.runs.methods import is_plain

FEWEST = 4
"""With fewer runs a front of the best is no picture."""


def closeups(runs: Iterable[Any] | Any) -> list[Picture]:
    """Of traced updates: memory always; traffic where ranks talk; schedules where two can be compared; each pipeline,
    each mixture.
    """
    many = [one for one in shown(runs) if one.data.memory and not one.is_ceiling]
    pipelines = [one for one in many if traced.bubble_of(one) is not None]
    talking = [one for one in many if one.data.traffic]
    found = [memory(many)] if many else []
    if talking:
        found.append(communication(talking))
    if len(pipelines) > 1:
        found.append(schedules(pipelines))
    found += [timeline(one) for one in pipelines]
    return found + [experts(one) for one in many if any(load.sum() for load in one.data.experts.values())]


def sparse(runs: Iterable[Any] | Any) -> list[Picture]:
    """What became zero: all such runs over time, the layers of each, and what it gains after the training."""
    many = [one for one in shown(runs) if one.data.sparsity and not one.is_ceiling]
    found = [sparsity(many), *map(sparse_layers, many)] if many else []
    gained = [one for one in many if one.data.exported.get("latency_seconds")]
    return found + ([exported(gained)] if gained else [])


def computing(runs: Iterable[Any] | Any) -> list[Picture]:
    """What is computed with which numbers: where a run is sparse or narrow, what it promises and gives, how its numbers
    are spread, and the layers of each such run; then the networks that were quantized after their training.
    """
    every = shown(runs)
    many = [one for one in every if one.data.numbers and not one.is_ceiling]
    other = [one for one in many if one.experiment is not None and not is_dense(one.experiment)]
    found: list[Picture] = []
    if other:
        times = three_numbers(many)
        found = [*([times] if times.rows else []), formats(many), *map(layers, other)]
    converted = [one for one in every if one.data.quantized.get("latency_seconds")]
    return found + ([quantized(converted)] if converted else [])


def worth(runs: Iterable[Any] | Any) -> list[Picture]:
    """What accuracy costs, where there are enough runs to choose from: against time and against memory."""
    many = [one for one in shown(runs) if not one.is_ceiling]
    if len(many) < FEWEST:
        return []
    return [picture for cost in ("time", "memory") if (picture := pareto(many, cost)).rows]


def combining(runs: Iterable[Any] | Any) -> list[Picture]:
    """How ranks combined what they learned, where a run did it in another way than averaging gradients over the
    machine's own link: loss against samples, time and bytes; where a step's time goes; break-even; staleness.
    """
    many = [one for one in shown(runs) if one.data.steps and not one.is_ceiling]
    if not any(combines(one) for one in many):
        return []
    found = [tradeoff(many)] if len(many) > 1 else []
    steps = split(many)
    if steps.rows:
        found.append(steps)
    if break_even.applies(many):
        found.append(break_even.break_even(many))
    return found + ([staleness(many)] if any(one.data.staleness.sum() for one in many) else [])


def combines(one: LabeledRun) -> bool:
    """Has this run a method, or a link, about which `combining` has something to show?"""
    experiment = one.experiment
    if experiment is None or one.world_size < 2:
        return False
    return not is_plain(experiment) or experiment.launch.network is not None
