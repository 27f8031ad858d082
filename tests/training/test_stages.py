"""Cutting a chain into stages: the exact smallest maximum, and every stage held by one rank."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.experiment import Layout
from labkit.parallel.stages import minimal_maximum, pp_rank_of_last_stage, split_into_stages, stages_of_rank


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.integers(1, 9))
def test_no_other_cut_has_a_cheaper_dearest_stage(costs: list[int], parts: int) -> None:
    if parts > len(costs):
        with pytest.raises(ValueError, match="cannot be cut"):
            minimal_maximum(costs, parts)
        return
    lengths = minimal_maximum(costs, parts)
    assert sum(lengths) == len(costs)
    assert min(lengths) >= 1

    def worst(places: tuple[int, ...]) -> int:
        edges = (0, *places, len(costs))
        return max(sum(costs[a:b]) for a, b in pairwise(edges))

    mine = tuple(sum(lengths[: index + 1]) for index in range(parts - 1))
    assert worst(mine) == min(worst(places) for places in combinations(range(1, len(costs)), parts - 1))


def test_groups_keep_the_order_of_the_chain() -> None:
    assert split_into_stages(["a", "b", "c"], [1, 2]) == [["a"], ["b", "c"]]
    with pytest.raises(ValueError, match="do not make the 3 blocks"):
        split_into_stages(["a", "b", "c"], [1, 1])


@given(st.sampled_from([("1f1b", 1), ("interleaved_1f1b", 3), ("zbv", 2), ("dualpipev", 2)]), st.integers(1, 6))
def test_every_stage_is_held_once(schedule: tuple[str, int], ranks: int) -> None:
    layout = Layout(pp=ranks, schedule=schedule[0], stages_per_rank=schedule[1])
    held = [number for place in range(ranks) for number in stages_of_rank(layout, place)]
    assert sorted(held) == list(range(ranks * schedule[1]))
    assert ranks * schedule[1] - 1 in stages_of_rank(layout, pp_rank_of_last_stage(layout))
    if schedule[0] in ("zbv", "dualpipev"):
        assert pp_rank_of_last_stage(layout) == 0, "a V ends where it began"
