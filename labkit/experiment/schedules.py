"""The pipeline schedules: one line each, and everything that labkit needs to know of them (no torch).

To add a schedule of `torch.distributed.pipelining`, add a line here. Forms, rules, runs, proofs and plots follow. A
schedule that does not come with labkit is a subclass of `labkit.parallel.schedule.PipelineSchedule`.

A schedule is synchronous or asynchronous. A synchronous one finishes a step on all stages before the next one begins,
so it computes what one process computes. In an asynchronous one no stage waits: weights change while other minibatches
are on their way, so it brings an update rule of its own, and the gradients are stale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from labkit.experiment import own_methods
from labkit.experiment.registry import registry

StagesPerRank = Literal["one", "several", "two", "any"]
LeastMicrobatches = Literal["any", "ranks", "stages"]


@dataclass(frozen=True)
class Schedule:
    """The order of forward and backward passes of a pipeline."""

    key: str
    summary: str
    torch_class: str = ""
    """Class in torch.distributed.pipelining.schedules; empty if labkit runs the schedule itself (asynchronous)."""
    update_rule: str = ""
    """Update rule of an asynchronous schedule, as `module:Class`; empty for a synchronous one."""
    stages: StagesPerRank = "one"
    """Stages per rank."""
    fold: bool = False
    """The pipeline is folded into a V: the rank with the first stage also has the last one."""
    splits_backward: bool = False
    """Gradients of inputs and of weights are computed at different times."""
    single_microbatch: bool = False
    """The batch passes through the stages in one piece."""
    least_microbatches: LeastMicrobatches = "any"
    """At least as many micro-batches as there are pipeline ranks or stages."""
    whole_rounds: bool = False
    """Micro-batches come in rounds of one per rank."""
    textbook_bubble: bool = False
    """Its bubble is (p-1) / (v·m + p-1) for p ranks, v stages per rank and m micro-batches of equal length."""

    own_class: type | None = None
    """Class of a schedule that does not come with labkit; it orders the actions itself."""
    is_known: bool = True
    """False for the schedule of a file or of another notebook's cell, which is loaded on the ranks only."""

    @property
    def name(self) -> str:
        """The name for sentences and plots: the key, or the name of an own class."""
        return own_methods.class_name(self.key)

    @property
    def asynchronous(self) -> bool:
        """Whether stages step without waiting for each other, with gradients that are stale."""
        return bool(self.update_rule)


_TABLE = (
    Schedule(
        "naive",
        "one micro-batch passes through the stages",
        "ScheduleGPipe",
        single_microbatch=True,
        textbook_bubble=True,
    ),
    Schedule("gpipe", "all forward passes, then all backward passes", "ScheduleGPipe", textbook_bubble=True),
    Schedule("1f1b", "one forward, one backward", "Schedule1F1B", least_microbatches="ranks", textbook_bubble=True),
    Schedule(
        "interleaved_1f1b",
        "1F1B over several stages per rank",
        "ScheduleInterleaved1F1B",
        stages="several",
        whole_rounds=True,
        textbook_bubble=True,
    ),
    Schedule(
        "looped_bfs",
        "several stages per rank, breadth first",
        "ScheduleLoopedBFS",
        stages="several",
        textbook_bubble=True,
    ),
    Schedule(
        "interleaved_zero_bubble",
        "weight gradients fill the bubble",
        "ScheduleInterleavedZeroBubble",
        stages="several",
        whole_rounds=True,
        splits_backward=True,
    ),
    Schedule(
        "zbv",
        "zero bubble in a V over two stages per rank",
        "ScheduleZBVZeroBubble",
        stages="two",
        fold=True,
        splits_backward=True,
    ),
    Schedule(
        "dualpipev",
        "two directions at once, in a V",
        "ScheduleDualPipeV",
        stages="two",
        fold=True,
        splits_backward=True,
        least_microbatches="stages",
    ),
    Schedule(
        "pipedream",
        "asynchronous 1F1B over whole minibatches with weight stashing",
        update_rule="labkit.parallel.pipedream:PipeDream",
        single_microbatch=True,
    ),
)
SCHEDULES: dict[str, Schedule] = {schedule.key: schedule for schedule in _TABLE}
"""All schedules by name, in the order in which the form shows them."""

OF_CLASS = ("stages", "fold", "splits_backward", "least_microbatches", "whole_rounds")
"""What the class of an own schedule says of it, in attributes of these names."""


def schedule_of(key: str) -> Schedule:
    """Return the schedule that a key of the registry names.

    If the class must not be loaded in this process (own_methods.py), its base class speaks for it: nothing is required.
    """
    if key in SCHEDULES:
        return SCHEDULES[key]
    method = registry("layout.schedule")[key]
    own_class: Any = method.load()
    facts = {name: getattr(own_class, name) for name in OF_CLASS}
    return Schedule(key, method.summary, **facts, own_class=own_class, is_known=method.is_loaded)
