"""The order of a pipeline's actions, as a schedule of your own returns it, and why it cannot be run. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from labkit.experiment.fault import describe_error
from labkit.experiment.layout import Layout

ActionsOfRank = Callable[[int, int, Sequence[int], int], Iterable[str]]
"""(pp rank, number of pp ranks, its stages, micro-batches) to the actions of the rank: `PipelineSchedule.actions`."""
_ACTION = re.compile(r"(?P<stage>\d{1,9})(?P<kind>[FBIW])(?P<microbatch>\d{1,9})")


class Action(NamedTuple):
    """One computation: F forward, B backward, I backward to the inputs only, W backward to the weights only."""

    stage: int
    kind: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


class ImpossibleOrderError(ValueError):
    """Raised if a pipeline cannot run the actions; the message says in one sentence why."""


def why_impossible(actions: ActionsOfRank, layout: Layout, splits_backward: bool) -> str:
    """Return in one sentence why a pipeline of this layout cannot run the actions; empty if it can."""
    try:
        order = read_order(actions, layout)
        if not splits_backward:
            _insist_on_whole_backward(order)
        _insist_on_progress(order, layout.pp * layout.stages_per_rank)
    except ImpossibleOrderError as error:
        return str(error)
    return ""


def read_order(actions: ActionsOfRank, layout: Layout) -> dict[int, list[Action]]:
    """Call `actions` for every pp rank and return what it says; every rank has to run all that is its own, once.

    Raises ImpossibleOrderError.
    """
    return {pp_rank: _actions_of_rank(actions, layout, pp_rank) for pp_rank in range(layout.pp)}


def _actions_of_rank(actions: ActionsOfRank, layout: Layout, pp_rank: int) -> list[Action]:
    stages, microbatches = layout.stages(pp_rank), layout.microbatches
    most = 3 * len(stages) * microbatches
    try:
        written = list(islice(iter(actions(pp_rank, layout.pp, stages, microbatches)), most + 1))
    except Exception as error:
        raise ImpossibleOrderError(f"it failed for rank {pp_rank}: {describe_error(error)}") from None
    if len(written) > most:
        raise ImpossibleOrderError(f"rank {pp_rank} has more than {most} actions, three per stage and micro-batch")
    order = [_read(text, pp_rank) for text in written]
    _insist_on_each_once(order, stages, microbatches, pp_rank)
    return order


def _read(text: Any, pp_rank: int) -> Action:
    match = _ACTION.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ImpossibleOrderError(
            f"{str(text)[:40]!r} of rank {pp_rank} is not an action: write stage, kind (F, B, I, W) and micro-batch, "
            "such as 0F0"
        )
    return Action(int(match["stage"]), match["kind"], int(match["microbatch"]))


def _insist_on_each_once(order: list[Action], stages: Sequence[int], microbatches: int, pp_rank: int) -> None:
    """Raise ImpossibleOrderError unless every stage has one forward and one backward pass of every micro-batch."""
    seen: set[Action] = set()
    for action in order:
        if action.stage not in stages:
            own = " and ".join(map(str, stages))
            raise ImpossibleOrderError(f"rank {pp_rank} runs {action}, but its stages are {own}")
        if action.microbatch >= microbatches:
            raise ImpossibleOrderError(f"rank {pp_rank} runs {action}, but there are {microbatches} micro-batches")
        if action in seen:
            raise ImpossibleOrderError(f"rank {pp_rank} runs {action} twice")
        seen.add(action)
    for stage in stages:
        for microbatch in range(microbatches):
            kinds = "".join(kind for kind in "FBIW" if Action(stage, kind, microbatch) in seen)
            if kinds not in ("FB", "FIW"):
                raise ImpossibleOrderError(
                    f"rank {pp_rank} runs {', '.join(f'{stage}{kind}{microbatch}' for kind in kinds) or 'nothing'} of "
                    f"micro-batch {microbatch} on stage {stage}: it takes F and B, or F, I and W"
                )


def _insist_on_whole_backward(order: dict[int, list[Action]]) -> None:
    for pp_rank, actions in order.items():
        for action in actions:
            if action.kind == "I":
                raise ImpossibleOrderError(f"rank {pp_rank} runs {action}: set splits_backward = True in the class")


def _insist_on_progress(order: dict[int, list[Action]], stages: int) -> None:
    """Raise ImpossibleOrderError if the ranks wait for each other."""
    done: set[tuple[int, str, int]] = set()
    position = dict.fromkeys(order, 0)
    while any(position[pp_rank] < len(actions) for pp_rank, actions in order.items()):
        before = len(done)
        for pp_rank, actions in order.items():
            while position[pp_rank] < len(actions) and not _missing_before(actions[position[pp_rank]], stages, done):
                done.add(_released_by(actions[position[pp_rank]]))
                position[pp_rank] += 1
        if len(done) == before:
            waiting = (
                f"rank {pp_rank} with {action} for {' and '.join(_missing_before(action, stages, done))}"
                for pp_rank, actions in order.items()
                for action in actions[position[pp_rank] :][:1]
            )
            raise ImpossibleOrderError(f"no rank can go on: {'; '.join(waiting)}")


def _released_by(action: Action) -> tuple[int, str, int]:
    """Return what an action makes possible; I counts as B, because both release the previous stage."""
    return action.stage, "B" if action.kind == "I" else action.kind, action.microbatch


def _missing_before(action: Action, stages: int, done: set[tuple[int, str, int]]) -> list[str]:
    """Return what has to be computed before `action` and is not `done` yet."""
    return [
        f"{stage}{kind}{action.microbatch}"
        for stage, kind in _needed_before(action, stages)
        if (stage, kind, action.microbatch) not in done
    ]


def _needed_before(action: Action, stages: int) -> Iterator[tuple[int, str]]:
    """Yield stage and kind of what an action computes with."""
    if action.kind == "F":
        if action.stage:
            yield action.stage - 1, "F"
    elif action.kind == "W":
        yield action.stage, "B"
    else:
        yield action.stage, "F"
        if action.stage + 1 < stages:
            yield action.stage + 1, "B"
