"""The bubble of a pipeline: as measured, as simulated from its schedule, and by the textbook formula.

The *bubble* is the fraction of (ranks × span) in which ranks do not compute. The measured one includes everything:
waiting for micro-batches and messages, and random delays. The schedule's own bubble is simulated from the recorded
order of each rank: every action takes the median time of its (stage, kind) and starts as soon as its dependencies are
done; messages take no time. The textbook formula, for schedules whose stages all take equally long, is
(p-1) / (v·m + p-1) for p ranks with v stages each and m micro-batches (Huang et al. 2019, arXiv:1811.06965; Narayanan
et al. 2021, arXiv:2104.04473).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from labkit.experiment import Experiment, Layout


class Action(NamedTuple):
    """One computation of a rank: F forward, B backward, I backward for the inputs only, W for the weights only."""

    kind: str
    stage: int
    microbatch: int
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin


Timeline = Mapping[int, Sequence[Action]]
"""The actions of each rank, in the order in which it computed them."""


@dataclass(frozen=True)
class Bubble:
    """Idle fractions of (ranks × span), and the spans in seconds."""

    measured: float
    """Measured bubble."""
    own: float
    """Bubble of the schedule itself, simulated with the measured durations of the stages."""
    textbook: float | None
    """Bubble by the formula for stages that take equally long; null if the schedule has no such formula."""
    measured_seconds: float
    """Measured time from the first to the last action of the pipeline (s)."""
    own_seconds: float
    """The same time in the simulation (s)."""


def bubble_of(timeline: Timeline, experiment: Experiment) -> Bubble:
    """Return the bubble of the run's pipeline; raise ValueError if its order is impossible (a damaged file)."""
    return bubble(timeline, experiment.layout)


def bubble(timeline: Timeline, layout: Layout | None = None) -> Bubble:
    """Return the bubble of one pipeline; raise ValueError if its order is impossible (a damaged file)."""
    simulated = simulate(timeline)
    formula = textbook_bubble(layout) if layout is not None else None
    return Bubble(idle_fraction(timeline), idle_fraction(simulated), formula, span(timeline), span(simulated))


def span(timeline: Timeline) -> float:
    """Return the seconds from the first begin to the last end."""
    actions = [action for row in timeline.values() for action in row]
    return max(action.end for action in actions) - min(action.begin for action in actions) if actions else 0.0


def idle_fraction(timeline: Timeline) -> float:
    """Return 1 - Σ busy / (ranks × span)."""
    available = len(timeline) * span(timeline)
    return 1 - sum(action.seconds for row in timeline.values() for action in row) / available if available else 0.0


def textbook_bubble(layout: Layout) -> float | None:
    """Return (p-1) / (v·m + p-1); None for a schedule without a closed form.

    With several passes per optimizer step, each fills and drains the pipeline again, so the fraction is that of one.
    """
    if not layout.order.textbook_bubble:
        return None
    return (layout.pp - 1) / (layout.stages_per_rank * layout.microbatches_per_pass + layout.pp - 1)


def simulate(timeline: Timeline) -> dict[int, list[Action]]:
    """Return the actions in the same order with median durations, starting at second 0.

    F of stage s waits for F of s-1; B and I of s wait for B or I of s+1 and for F of s; W waits for I; and each rank
    computes one action at a time, in its order. Dependencies that are not in the timeline (of an asynchronous pipeline)
    count as done. Raises ValueError if the order is impossible.
    """
    durations = median_durations(timeline)
    recorded = {_key(action) for row in timeline.values() for action in row}
    rows: dict[int, list[Action]] = {rank: [] for rank in timeline}
    ends: dict[tuple[str, int, int], float] = {}
    last_stage = max((action.stage for row in timeline.values() for action in row), default=0)
    free_at = dict.fromkeys(timeline, 0.0)
    remaining = {rank: list(reversed(row)) for rank, row in timeline.items()}
    while any(remaining.values()):
        done_before = len(ends)
        for rank, row in remaining.items():
            while row:
                action = row[-1]
                required_ends = [ends.get(key) for key in _dependencies(action, last_stage) if key in recorded]
                known_ends = [moment for moment in required_ends if moment is not None]
                if len(known_ends) < len(required_ends):
                    break
                begin = max([free_at[rank], *known_ends])
                free_at[rank] = end = begin + durations[action.stage, action.kind]
                ends[_key(action)] = end
                rows[rank].append(action._replace(begin=begin, end=end))
                row.pop()
        if len(ends) == done_before:
            raise ValueError("the order of these actions is impossible: every rank waits for another one")
    return rows


def median_durations(timeline: Timeline) -> dict[tuple[int, str], float]:
    """Return the median seconds of each (stage, kind)."""
    seconds: dict[tuple[int, str], list[float]] = {}
    for row in timeline.values():
        for action in row:
            seconds.setdefault((action.stage, action.kind), []).append(action.seconds)
    return {key: float(np.median(values)) for key, values in seconds.items()}


def _key(action: Action) -> tuple[str, int, int]:
    """Return the key of an action; I counts as B, because both release the previous stage."""
    return ("B" if action.kind == "I" else action.kind, action.stage, action.microbatch)


def _dependencies(action: Action, last_stage: int) -> list[tuple[str, int, int]]:
    kind, stage, microbatch = _key(action)
    if kind == "F":
        return [("F", stage - 1, microbatch)] if stage else []
    if kind == "W":
        return [("B", stage, microbatch)]
    return [("F", stage, microbatch)] + ([("B", stage + 1, microbatch)] if stage < last_stage else [])


def first_pipeline(timeline: Timeline, layout: Layout) -> dict[int, list[Action]]:
    """Return the timelines of the pipeline that rank 0 belongs to; with other parallel axes there are several."""
    rank_0 = layout.coordinates(0)
    pipeline_ranks = [
        rank
        for rank in timeline
        if rank < layout.world_size
        and all(coordinate == rank_0[axis] for axis, coordinate in layout.coordinates(rank).items() if axis != "pp")
    ]
    return {rank: list(timeline[rank]) for rank in sorted(pipeline_ranks)}
