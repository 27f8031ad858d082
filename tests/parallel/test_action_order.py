"""The order of a pipeline's actions: every order that can be run is accepted, and no other (CPU, no processes)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torch_schedules

from labkit.experiment.layout import Layout
from labkit.parallel.action_order import ActionsOfRank, read_order, why_impossible
from labkit.parallel.schedule import PipelineSchedule

Order = dict[int, list[str]]


def actions(order: Order) -> ActionsOfRank:
    """The function of a schedule that has this order."""
    return lambda pp_rank, pp, stages, microbatches: order[pp_rank]


def layout(pp: int, stages_per_rank: int, microbatches: int) -> Layout:
    return Layout(pp=pp, schedule="interleaved_1f1b", stages_per_rank=stages_per_rank, microbatches=microbatches)


def draw_order(draw: st.DrawFn, split: bool) -> tuple[Layout, Order]:
    """An order that a pipeline computes if every rank takes any action that it can, at random."""
    shape = layout(draw(st.integers(2, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3)))
    count = shape.pp * shape.stages_per_rank
    kinds = "FIW" if split else "FB"
    remaining = {
        (stage, kind, index) for stage in range(count) for kind in kinds for index in range(shape.microbatches)
    }
    order: Order = {pp_rank: [] for pp_rank in range(shape.pp)}
    while remaining:
        possible = sorted(action for action in remaining if not needed(action, count, kinds) & remaining)
        action = draw(st.sampled_from(possible))
        remaining.remove(action)
        order[action[0] % shape.pp].append("{}{}{}".format(*action))
    return shape, order


def needed(action: tuple[int, str, int], count: int, kinds: str) -> set[tuple[int, str, int]]:
    """What is computed before an action, by its definition."""
    stage, kind, index = action
    backward = kinds[1]
    if kind == "F":
        return {(stage - 1, "F", index)}
    if kind == "W":
        return {(stage, "I", index)}
    return {(stage, "F", index), (stage + 1, backward, index)} if stage + 1 < count else {(stage, "F", index)}


@st.composite
def orders(draw: st.DrawFn) -> tuple[Layout, Order, bool]:
    split = draw(st.booleans())
    return *draw_order(draw, split), split


@given(orders())
def test_every_order_that_can_be_computed_is_accepted(drawn: tuple[Layout, Order, bool]) -> None:
    shape, order, split = drawn
    assert why_impossible(actions(order), shape, split) == ""
    read = read_order(actions(order), shape)
    assert {pp_rank: list(map(str, row)) for pp_rank, row in read.items()} == order
    for row in read.values():
        for action in row:
            assert str(torch_schedules._Action.from_str(str(action))) == str(action)


@given(orders(), st.data())
def test_an_action_too_few_or_too_many_is_refused(drawn: tuple[Layout, Order, bool], data: st.DataObject) -> None:
    shape, order, split = drawn
    pp_rank = data.draw(st.sampled_from(sorted(order)))
    index = data.draw(st.integers(0, len(order[pp_rank]) - 1))
    without = order | {pp_rank: order[pp_rank][:index] + order[pp_rank][index + 1 :]}
    twice = order | {pp_rank: order[pp_rank][:index] + order[pp_rank][index : index + 1] + order[pp_rank][index:]}
    for wrong in (without, twice):
        sentence = why_impossible(actions(wrong), shape, split)
        assert f"rank {pp_rank} " in sentence
        assert "\n" not in sentence


@given(orders(), st.data())
def test_an_order_that_is_shuffled_is_refused_exactly_if_ranks_wait_for_each_other(
    drawn: tuple[Layout, Order, bool], data: st.DataObject
) -> None:
    shape, order, split = drawn
    shuffled = {pp_rank: data.draw(st.permutations(row)) for pp_rank, row in order.items()}
    ended = can_end(shuffled, shape.pp * shape.stages_per_rank, "FIW" if split else "FB")
    sentence = why_impossible(actions(shuffled), shape, split)
    assert (sentence == "") is ended
    assert ended or sentence.startswith("no rank can go on: ")


def can_end(order: Order, count: int, kinds: str) -> bool:
    """Whether all actions are computed if each rank waits for its next one."""
    rows = {pp_rank: [(int(text[0]), text[1], int(text[2])) for text in row] for pp_rank, row in order.items()}
    remaining = {action for row in rows.values() for action in row}
    while any(rows.values()):
        ready = [row for row in rows.values() if row and not needed(row[0], count, kinds) & remaining]
        if not ready:
            return False
        remaining.remove(ready[0].pop(0))
    return True


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ({0: ["0F0", "0B"], 1: ["1F0", "1B0"]}, "'0B' of rank 0 is not an action"),
        ({0: ["0F0", 7], 1: ["1F0", "1B0"]}, "'7' of rank 0 is not an action"),
        ({0: ["1F0", "0B0"], 1: ["1F0", "1B0"]}, "rank 0 runs 1F0, but its stages are 0"),
        ({0: ["0F1", "0B0"], 1: ["1F0", "1B0"]}, "rank 0 runs 0F1, but there are 1 micro-batches"),
        ({0: ["0F0"], 1: ["1F0", "1B0"]}, "rank 0 runs 0F0 of micro-batch 0 on stage 0: it takes F and B"),
        ({0: [], 1: ["1F0", "1B0"]}, "rank 0 runs nothing of micro-batch 0 on stage 0"),
        ({0: ["0F0", "0I0", "0W0"], 1: ["1F0", "1B0"]}, "rank 0 runs 0I0: set splits_backward = True"),
        ({0: ["0F0", "0B0"] * 9, 1: []}, "rank 0 has more than 3 actions"),
        ({0: ["0F0", "0B0"], 1: ["1B0", "1F0"]}, "no rank can go on: rank 0 with 0B0 for 1B0; rank 1 with 1B0 for 1F0"),
        ({1: []}, "it failed for rank 0: KeyError: 0"),
        ({0: 3}, "it failed for rank 0: TypeError"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(written: Any, words: str) -> None:
    sentence = why_impossible(actions(written), layout(2, 1, 1), splits_backward=False)
    assert words in sentence
    assert "\n" not in sentence


def test_a_generator_without_an_end_is_refused() -> None:
    def endless(pp_rank: int, pp: int, stages: Sequence[int], microbatches: int) -> Iterable[str]:
        while True:
            yield "0F0"

    assert "more than 3 actions" in why_impossible(endless, layout(2, 1, 1), splits_backward=False)


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"stages": "three"}, "stages is 'three'; it must be 'one' or 'several' or 'two' or 'any'"),
        ({"fold": True, "stages": "one"}, "stages is 'one'; it must be 'two'"),
        ({"least_microbatches": 4}, "least_microbatches is 4"),
        ({"splits_backward": "yes"}, "splits_backward is 'yes'; it must be True or False"),
    ],
)
def test_an_attribute_that_has_no_meaning_is_refused_when_the_class_is_defined(
    attributes: dict[str, Any], words: str
) -> None:
    with pytest.raises(TypeError, match=f"Mine.{words}"):
        type("Mine", (PipelineSchedule,), attributes)


def test_torchs_runtime_is_what_the_pipeline_builds_on() -> None:
    runtime = torch_schedules._PipelineScheduleRuntime
    assert issubclass(runtime, torch_schedules.PipelineScheduleMulti)
    assert hasattr(runtime, "_prepare_schedule_with_comms"), torch.__version__
