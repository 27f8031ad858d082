"""How much of a pipeline stood still, as measured and as its schedule alone would have it.

The *bubble* is the share of (ranks × span) in which no rank computes. Measured, it holds everything: waiting for
microbatches, messages, unequal luck. The schedule's own bubble comes from the recorded order of each rank, every action
as long as the median of its (stage, kind), started as soon as what it needs is there, messages free. The textbook has a
third one for schedules whose stages are all equally long: (p-1) / (v·m + p-1) for p ranks with v stages each and m
microbatches (Huang et al. 2019, arXiv:1811.06965; Narayanan et al. 2021, arXiv:2104.04473).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from labkit.experiment import Experiment, Layout


class Action(NamedTuple):
    """A rank computes: F forward, B backward, I backward to the inputs alone, W to the weights alone."""

    kind: str
    stage: int
    microbatch: int
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin


Timeline = Mapping[int, Sequence[Action]]
"""Rank to its actions, in the order in which it computed them."""

TEXTBOOK = ("naive", "gpipe", "1f1b", "interleaved_1f1b", "looped_bfs")
"""Schedules whose bubble has a closed form."""


@dataclass(frozen=True)
class Bubble:
    """Shares of (ranks × span) without work, and the spans in seconds."""

    measured: float
    own: float
    """That of the schedule itself, with stages as long as they were."""
    textbook: float | None
    """For stages of equal length; None where there is no formula."""
    measured_seconds: float
    own_seconds: float


def schedule(experiment: Experiment) -> str:
    """What drives the pipeline: the layout's schedule, or an update rule that has a pipeline of its own."""
    method = experiment.gradients.update.method
    return method if method == "pipedream" else experiment.layout.schedule


def bubble_of(timeline: Timeline, experiment: Experiment) -> Bubble:
    """That of the run's pipeline; an asynchronous one, of which some updates are seen, has no formula."""
    scheduled = schedule(experiment) == experiment.layout.schedule
    return bubble(timeline, experiment.layout if scheduled else None)


def bubble(timeline: Timeline, layout: Layout | None = None) -> Bubble:
    """The bubble of one pipeline; ValueError if its order cannot have been computed (a damaged file)."""
    simulated = ideal(timeline)
    known = textbook(layout) if layout is not None else None
    return Bubble(idle(timeline), idle(simulated), known, span(timeline), span(simulated))


def span(timeline: Timeline) -> float:
    """Seconds from the first begin to the last end."""
    actions = [action for row in timeline.values() for action in row]
    return max(action.end for action in actions) - min(action.begin for action in actions) if actions else 0.0


def idle(timeline: Timeline) -> float:
    """1 - Σ busy / (ranks × span)."""
    whole = len(timeline) * span(timeline)
    return 1 - sum(action.seconds for row in timeline.values() for action in row) / whole if whole else 0.0


def textbook(layout: Layout) -> float | None:
    """(p-1) / (v·m + p-1); None for a schedule without a closed form.

    With several passes an update each fills and drains the pipeline anew, so their share is that of one.
    """
    if layout.schedule not in TEXTBOOK:
        return None
    microbatches = 1 if layout.schedule == "naive" else layout.microbatches
    return (layout.pp - 1) / (layout.stages_per_rank * microbatches + layout.pp - 1)


def ideal(timeline: Timeline) -> dict[int, list[Action]]:
    """The same order with median durations, from second 0 on.

    F of stage s waits for F of s-1; B and I of s wait for B or I of s+1 and for F of s; W waits for I; and each rank
    does one thing at a time, in its order. What began before the timeline (in an asynchronous pipeline) is there
    already. ValueError where that leads nowhere.
    """
    durations = medians(timeline)
    seen = {_key(action) for row in timeline.values() for action in row}
    rows: dict[int, list[Action]] = {rank: [] for rank in timeline}
    ended: dict[tuple[str, int, int], float] = {}
    last = max((action.stage for row in timeline.values() for action in row), default=0)
    free = dict.fromkeys(timeline, 0.0)
    waiting = {rank: list(reversed(row)) for rank, row in timeline.items()}
    while any(waiting.values()):
        before = len(ended)
        for rank, row in waiting.items():
            while row:
                action = row[-1]
                needs = [ended.get(one) for one in _needed(action, last) if one in seen]
                known = [moment for moment in needs if moment is not None]
                if len(known) < len(needs):
                    break
                begin = max([free[rank], *known])
                free[rank] = end = begin + durations[action.stage, action.kind]
                ended[_key(action)] = end
                rows[rank].append(action._replace(begin=begin, end=end))
                row.pop()
        if len(ended) == before:
            raise ValueError("no rank can go on: the order of these actions cannot have been computed")
    return rows


def medians(timeline: Timeline) -> dict[tuple[int, str], float]:
    """Seconds of each (stage, kind)."""
    found: dict[tuple[int, str], list[float]] = {}
    for row in timeline.values():
        for action in row:
            found.setdefault((action.stage, action.kind), []).append(action.seconds)
    return {key: float(np.median(values)) for key, values in found.items()}


def _key(action: Action) -> tuple[str, int, int]:
    """Whole backward passes and those to the inputs alone release the stage before alike."""
    return ("B" if action.kind == "I" else action.kind, action.stage, action.microbatch)


def _needed(action: Action, last: int) -> list[tuple[str, int, int]]:
    kind, stage, number = _key(action)
    if kind == "F":
        return [("F", stage - 1, number)] if stage else []
    if kind == "W":
        return [("B", stage, number)]
    return [("F", stage, number)] + ([("B", stage + 1, number)] if stage < last else [])


def of_one_pipeline(timeline: Timeline, layout: Layout) -> dict[int, list[Action]]:
    """The ranks of the pipeline that rank 0 is in: with other axes there are several side by side."""
    first = layout.coordinates(0)
    together = [
        rank
        for rank in timeline
        if rank < layout.world_size
        and all(place == first[axis] for axis, place in layout.coordinates(rank).items() if axis != "pp")
    ]
    return {rank: list(timeline[rank]) for rank in sorted(together)}
