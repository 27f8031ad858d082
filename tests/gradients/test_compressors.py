"""What compressors promise, shown among real ranks without a model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.experiment.registry import registry
from labkit.gradients.compression.randomk import draw_indices
from labkit.gradients.compression.topk import largest_indices
from labkit.gradients.cost import all_gather_bytes, all_reduce_bytes, all_to_all_bytes
from tests.gradients import wired
from tests.parallel.below import on_ranks

LabeledRun = dict[str, list[Any]]
COUNT = sum(math.prod(shape) for shape in wired.SHAPES)


@pytest.fixture(scope="module")
def by_two() -> LabeledRun:
    demonstrations = (wired.limits, wired.counted, wired.digests, wired.overlap, wired.kept, wired.summed)
    return on_ranks(2, *demonstrations, wired.unbiased, wired.feedback, wired.many_buckets)


@pytest.fixture(scope="module")
def by_four() -> LabeledRun:
    return on_ranks(4, wired.limits, wired.counted, wired.digests, wired.kept, wired.storeys)


@pytest.fixture(params=["by_two", "by_four"])
def shown(request: pytest.FixtureRequest) -> LabeledRun:
    found: LabeledRun = request.getfixturevalue(request.param)
    return found


def test_every_method_is_looked_at() -> None:
    assert {*wired.METHODS, "onebit_adam"} == set(registry("gradients.compression").names())


def test_with_nothing_left_out_every_method_gives_the_mean(shown: LabeledRun) -> None:
    for of_a_rank in shown["limits"]:
        for method, distance in of_a_rank.items():
            # A level of 32,767 is 1e-4 of the largest number here; all else is exact but for rounding in float64.
            assert distance <= (2e-4 if method.startswith("int8") else 1e-12), method


def test_bytes_counted_are_those_of_the_formula(shown: LabeledRun) -> None:
    for of_a_rank in shown["counted"]:
        for method, (counted, formula, summed_up) in of_a_rank.items():
            assert counted == formula == summed_up > 0, method


def test_all_ranks_hold_the_same_bits(shown: LabeledRun) -> None:
    first, *others = shown["digests"]
    assert all(other == first for other in others)
    assert len(set(first.values())) == len(first), "the methods differ"


def test_what_error_feedback_leaves_out_it_keeps(shown: LabeledRun) -> None:
    for of_a_rank in shown["kept"]:
        for method, missed in of_a_rank.items():
            assert missed < 1e-5 if method == "sign" else missed < 1e-10, method  # scales travel in float32


def test_it_does_not_matter_when_buckets_are_sent(by_two: LabeledRun) -> None:
    for of_a_rank in by_two["overlap"]:
        assert all(of_a_rank.values()), of_a_rank


def test_sums_are_the_mean_times_the_ranks(by_two: LabeledRun) -> None:
    assert max(by_two["summed"]) < 1e-12


def test_stochastic_rounding_is_right_on_average(by_two: LabeledRun) -> None:
    for of_a_rank in by_two["unbiased"]:
        for method, (distance, spread) in of_a_rank.items():
            # The largest of 134 normal numbers lies beyond 4.5 once in a thousand times; the seed is fixed.
            assert distance < 4.5, method
            assert spread > 0.05, method


def test_error_feedback_makes_the_difference_of_the_textbook(by_two: LabeledRun) -> None:
    for of_a_rank in by_two["feedback"]:
        for method, (with_feedback, without) in of_a_rank.items():
            assert with_feedback < 0.1, method
            assert without > 0.9, method


def test_powersgd_bears_many_buckets_and_low_ranks_come_through_whole(by_two: LabeledRun) -> None:
    for of_a_rank in by_two["many_buckets"]:
        assert len(of_a_rank) == 60
        assert max(of_a_rank) < 1e-9


def test_two_storeys_give_the_mean_and_send_one_part_between_hosts(by_four: LabeledRun) -> None:
    for of_a_rank in by_four["storeys"]:
        for method, (distance, counted, formula, by_storey) in of_a_rank.items():
            assert distance < 1e-12, method
            assert counted == formula == sum(by_storey)
        # Two bundles of an even count, float64, three steps: each rank has a half of both.
        inside = 3 * sum(all_to_all_bytes(8 * size, 2) + all_gather_bytes(4 * size, 2) for size in (62, 74))
        assert of_a_rank["none"][3] == [inside, 3 * sum(all_reduce_bytes(4 * size, 2) for size in (62, 74))]


# -- choosing entries -------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 30_000), st.floats(0, 1), st.integers(0, 99), st.sampled_from([1.0, 8.0]))
def test_a_sampled_threshold_finds_exactly_the_largest(size: int, part: float, seed: int, power: float) -> None:
    random = torch.Generator().manual_seed(seed)
    flat = torch.randn(size, generator=random).pow(power)
    flat[: size // 3] = 0  # not like the rest
    count = max(1, int(part * size))
    places = largest_indices(flat, count, random)
    assert len(set(places.tolist())) == count
    assert sorted(flat[places].abs().tolist()) == sorted(flat.abs().topk(count).values.tolist())


@given(st.integers(1, 500), st.data())
def test_random_places_are_different_and_the_same_for_the_same_seed(size: int, data: st.DataObject) -> None:
    count, seed = data.draw(st.integers(1, size)), data.draw(st.integers(0, 99))
    places = draw_indices(size, count, torch.Generator().manual_seed(seed))
    assert len(set(places.tolist())) == count
    assert 0 <= min(places.tolist()) <= max(places.tolist()) < size
    assert torch.equal(places, draw_indices(size, count, torch.Generator().manual_seed(seed)))


def test_every_place_is_drawn_as_often_as_any_other() -> None:
    random, hits = torch.Generator().manual_seed(0), torch.zeros(30)
    for _ in range(6000):
        hits[draw_indices(30, 3, random)] += 1
    assert (hits - 600).abs().max() < 5 * 600**0.5
