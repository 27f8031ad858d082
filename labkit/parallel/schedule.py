"""Pipeline schedules: what they require of a layout, and the base class of your own. Imports no torch.

A schedule of your own is an order of actions for every rank of the pipeline. An action is written as in
`torch.distributed.pipelining`: number of the stage, kind, number of the micro-batch, e.g. `1F0`. The kinds are F
forward, B backward, and, in its place, I backward to the inputs and W backward to the weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, get_args

from labkit.experiment.layout import Layout
from labkit.experiment.machine import Machine
from labkit.experiment.problem import Problem
from labkit.experiment.schedules import LeastMicrobatches, StagesPerRank
from labkit.experiment.schema import Experiment
from labkit.parallel.action_order import why_impossible


class SynchronousSchedule:
    """A pipeline schedule under which all stages finish a step before the next one begins."""

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield what it requires of stages and micro-batches, if there is a pipeline."""
        return schedule_problems(experiment.layout) if experiment.layout.pp > 1 else iter(())


class PipelineSchedule(SynchronousSchedule, ABC):
    """Base class of your own schedules: define `actions`, and set the attributes that differ.

    The stages are distributed over the ranks in a loop (rank r of p has the stages r, r+p, r+2p, …) or, with `fold`, in
    a V (r and 2p-1-r).
    """

    stages: ClassVar[StagesPerRank] = "any"
    """Stages per rank."""
    fold: ClassVar[bool] = False
    """Whether the pipeline is folded into a V; it then has two stages per rank."""
    splits_backward: ClassVar[bool] = False
    """Whether there are actions of the kinds I and W."""
    least_microbatches: ClassVar[LeastMicrobatches] = "any"
    """At least as many micro-batches as there are pipeline ranks or stages."""
    whole_rounds: ClassVar[bool] = False
    """Whether micro-batches come in rounds of one per rank."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        legal: dict[str, tuple[Any, ...]] = {
            "stages": ("two",) if cls.fold is True else get_args(StagesPerRank),
            "least_microbatches": get_args(LeastMicrobatches),
            **dict.fromkeys(("fold", "splits_backward", "whole_rounds"), (True, False)),
        }
        if cls.fold is True and "stages" not in vars(cls):
            cls.stages = "two"
        for name, values in legal.items():
            if getattr(cls, name) not in values:
                expected = " or ".join(map(repr, values))
                raise TypeError(f"{cls.__name__}.{name} is {getattr(cls, name)!r}; it must be {expected}")

    @staticmethod
    @abstractmethod
    def actions(pp_rank: int, pp: int, stages: Sequence[int], microbatches: int) -> Iterable[str]:
        """Return the actions of rank `pp_rank` of `pp` in their order, e.g. `["0F0", "0F1", "0B0", "0B1"]`.

        `stages` are the numbers of the rank's own stages, in the order of the chain. Every stage has one forward pass
        of every micro-batch, and one backward pass, B or I and W. What another rank has to send first is waited for.
        """

    @classmethod
    def problems(cls, experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield what the attributes require, and why the order of the actions cannot be run."""
        layout = experiment.layout
        unmet = list(super().problems(experiment, machine))
        yield from unmet
        if layout.pp > 1 and not unmet and cls is not PipelineSchedule:
            reason = why_impossible(cls.actions, layout, cls.splits_backward)
            if reason:
                yield Problem("layout.schedule", f"{cls.__name__}.actions: {reason}", "1f1b")


def schedule_problems(layout: Layout) -> Iterator[Problem]:
    """Yield the problems of the schedule with the number of stages and micro-batches."""
    order, stages = layout.order, layout.stages_per_rank
    if order.splits_backward and layout.activation_checkpointing == "selective":
        yield Problem(
            "layout.activation_checkpointing",
            f"{order.name} splits the backward pass of a block in two, but torch keeps what selective recomputation "
            "needs for only one of them",
            "full",
        )
    count = layout.pp * stages
    if order.stages == "two" and stages != 2:
        why = "folds the pipeline and needs" if order.fold else "needs"
        yield Problem("layout.stages_per_rank", f"{order.name} {why} exactly 2 stages per rank", 2)
    elif order.stages == "several" and stages < 2:
        yield Problem("layout.stages_per_rank", f"{order.name} needs at least 2 stages per rank", 2)
    elif order.stages == "one" and stages != 1:
        yield Problem("layout.stages_per_rank", f"{order.name} runs one stage per rank", 1)
    least = {"any": 1, "ranks": layout.pp, "stages": count}[order.least_microbatches]
    if layout.microbatches < least:
        yield Problem("layout.microbatches", f"{order.name} needs at least as many microbatches as stages", least)
    elif order.whole_rounds:
        rounds = max(1, layout.microbatches // layout.pp)
        if layout.microbatches % rounds:
            nearest = layout.microbatches // layout.pp * layout.pp
            yield Problem("layout.microbatches", f"{order.name} needs a multiple of {layout.pp} microbatches", nearest)
