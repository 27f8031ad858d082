"""The schedule simulator against the textbook, and against what must hold for every schedule."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.experiment import Experiment, Layout
from labkit.runs.pipeline import Action, bubble, bubble_of, idle_fraction, simulate, span, textbook_bubble


def chunks(*order: tuple[str, int, int], seconds: dict[str, float] | None = None) -> list[Action]:
    """Actions of one rank, as if one had followed the other."""
    took = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0} | (seconds or {})
    found, now = [], 0.0
    for kind, stage, number in order:
        found.append(Action(kind, stage, number, now, now := now + took[kind]))
    return found


def gpipe(ranks: int, microbatches: int, **named: Any) -> dict[int, list[Action]]:
    """All forward, then all backward."""
    every = range(microbatches)
    return {
        rank: chunks(*(("F", rank, m) for m in every), *(("B", rank, m) for m in every), **named)
        for rank in range(ranks)
    }


def one_f_one_b(ranks: int, microbatches: int, **named: Any) -> dict[int, list[Action]]:
    rows = {}
    for rank in range(ranks):
        ahead = min(microbatches, ranks - rank)
        order = [("F", rank, m) for m in range(ahead)]
        for m in range(microbatches):
            order.append(("B", rank, m))
            if ahead + m < microbatches:
                order.append(("F", rank, ahead + m))
        rows[rank] = chunks(*order, **named)
    return rows


def looped(ranks: int, per_rank: int, microbatches: int, **named: Any) -> dict[int, list[Action]]:
    """Breadth first through the stages rank, rank + ranks, …"""
    rows = {}
    for rank in range(ranks):
        stages = range(rank, ranks * per_rank, ranks)
        order = [("F", s, m) for s in stages for m in range(microbatches)]
        order += [("B", s, m) for s in reversed(stages) for m in range(microbatches)]
        rows[rank] = chunks(*order, **named)
    return rows


@given(st.integers(2, 6), st.integers(1, 12), st.floats(0.1, 9), st.floats(0.1, 9))
def test_even_stages_have_the_bubble_of_the_textbook(ranks: int, more: int, forward: float, backward: float) -> None:
    microbatches = ranks + more - 1
    named = {"seconds": {"F": forward, "B": backward}}
    layout = {"pp": ranks, "microbatches": microbatches}
    for schedule, rows in (
        ("gpipe", gpipe(ranks, microbatches, **named)),
        ("1f1b", one_f_one_b(ranks, microbatches, **named)),
    ):
        found = bubble(rows, Layout(**layout, schedule=schedule))
        assert found.own == pytest.approx((ranks - 1) / (microbatches + ranks - 1))
        assert found.own == pytest.approx(found.textbook)
        assert found.own_seconds == pytest.approx((microbatches + ranks - 1) * (forward + backward))


@given(st.integers(2, 4), st.integers(2, 3), st.integers(1, 4))
def test_several_stages_a_rank_shrink_it(ranks: int, per_rank: int, rounds: int) -> None:
    microbatches = ranks * rounds
    layout = Layout(pp=ranks, microbatches=microbatches, stages_per_rank=per_rank, schedule="looped_bfs")
    found = bubble(looped(ranks, per_rank, microbatches), layout)
    assert found.own == pytest.approx((ranks - 1) / (per_rank * microbatches + ranks - 1))
    assert found.own == pytest.approx(found.textbook)


def test_naive_is_one_microbatch() -> None:
    assert textbook_bubble(Layout(pp=4, schedule="naive", microbatches=8)) == 3 / 4
    assert bubble(gpipe(4, 1)).own == pytest.approx(3 / 4)
    assert textbook_bubble(Layout(pp=2, schedule="zbv", stages_per_rank=2)) is None


def test_splitting_the_backward_pass_fills_the_end() -> None:
    # Two ranks, two microbatches: the last rank's weight gradients fit into what it would wait.
    whole = one_f_one_b(2, 2)
    split = {
        0: chunks(("F", 0, 0), ("F", 0, 1), ("I", 0, 0), ("W", 0, 0), ("I", 0, 1), ("W", 0, 1)),
        1: chunks(("F", 1, 0), ("I", 1, 0), ("F", 1, 1), ("I", 1, 1), ("W", 1, 0), ("W", 1, 1)),
    }
    assert bubble(split).own < bubble(whole).own


durations = st.lists(st.floats(0.01, 5), min_size=4, max_size=4)


@given(durations, durations, st.integers(4, 9))
def test_uneven_stages_wait_for_the_slowest(forward: list[float], backward: list[float], microbatches: int) -> None:
    rows = {
        rank: chunks(*((a.kind, a.stage, a.microbatch) for a in row), seconds={"F": forward[rank], "B": backward[rank]})
        for rank, row in one_f_one_b(4, microbatches).items()
    }
    simulated = simulate(rows)
    slowest = max(f + b for f, b in zip(forward, backward, strict=True))
    assert span(simulated) >= microbatches * slowest * (1 - 1e-9)
    assert span(simulated) >= sum(forward) + sum(backward) - 1e-9
    assert 0 <= idle_fraction(simulated) < 1
    ends = {(a.kind, a.stage, a.microbatch): a for row in simulated.values() for a in row}
    for (kind, stage, number), action in ends.items():
        if kind == "F" and stage:
            assert action.begin >= ends["F", stage - 1, number].end
        if kind == "B" and stage < 3:
            assert action.begin >= ends["B", stage + 1, number].end
    for rank, row in simulated.items():
        assert [a[:3] for a in row] == [a[:3] for a in rows[rank]], "the order is that of the rank"
        assert all(one.end <= other.begin for one, other in itertools.pairwise(row))


def test_one_slow_moment_does_not_change_the_schedule() -> None:
    rows = gpipe(2, 8)
    last = rows[1][-1]
    disturbed = {**rows, 1: [*rows[1][:-1], last._replace(end=last.end + 50)]}
    assert bubble(disturbed).own == pytest.approx(bubble(rows).own)
    assert bubble(disturbed).measured > bubble(rows).measured


def test_what_began_before_the_timeline_is_there_already() -> None:
    # Three updates of an asynchronous pipeline of two stages, and the first message of each rank lies before them.
    rows = {
        0: chunks(*((kind, 0, number + (kind == "F")) for number in (4, 5, 6) for kind in "FB")),
        1: chunks(*((kind, 1, number) for number in (4, 5, 6) for kind in "FB")),
    }
    simulated = simulate(rows)
    assert [action.begin for action in simulated[1]] == [0, 1, 3, 4, 6, 7], "nothing to wait for: F 1 s, B 2 s"
    assert simulated[0][1].begin == simulated[1][1].end, "the gradient of minibatch 4 comes from the last stage"
    asynchronous = Experiment().set({"layout.pp": 2, "layout.schedule": "pipedream"})
    assert bubble_of(rows, asynchronous).textbook is None
    assert bubble_of(gpipe(2, 4), Experiment().set({"layout": {"pp": 2, "microbatches": 4}})).textbook == 1 / 5


def test_what_cannot_have_been_computed_is_refused() -> None:
    with pytest.raises(ValueError, match="every rank waits for another one"):
        simulate({0: chunks(("F", 0, 0)), 1: chunks(("B", 1, 0), ("F", 1, 0))})
    assert idle_fraction({}) == span({}) == 0
