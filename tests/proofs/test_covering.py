"""Covering arrays: every pair that may meet does, in rows that may be, and far fewer of them than there are in all."""

from __future__ import annotations

from itertools import combinations, product
from math import prod
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.proofs.covering import CoveringArray, Row

Bans = list[dict[str, int]]


@st.composite
def worlds(draw: st.DrawFn) -> tuple[dict[str, list[int]], Bans]:
    """Some factors, and combinations of one to three settings that may not be."""
    names = "abcde"[: draw(st.integers(1, 5))]
    factors = {name: list(range(draw(st.integers(1, 4)))) for name in names}
    setting = {name: st.sampled_from(values) for name, values in factors.items()}
    ban = st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True).flatmap(
        lambda some: st.fixed_dictionaries({name: setting[name] for name in some})
    )
    return factors, draw(st.lists(ban, max_size=8))


def may_be(row: Row, bans: Bans) -> bool:
    return not any(ban.items() <= row.items() for ban in bans)


def pairs(row: Row) -> set[Any]:
    return {frozenset(pair) for pair in combinations(row.items(), 2)}


@settings(deadline=None, max_examples=200)
@given(worlds())
def test_every_pair_that_may_meet_does(world: tuple[dict[str, list[int]], Bans]) -> None:
    factors, bans = world
    whole = [dict(zip(factors, values, strict=True)) for values in product(*factors.values())]
    legal = [row for row in whole if may_be(row, bans)]
    found = CoveringArray(factors, lambda row: may_be(row, bans))
    assert all(row in legal for row in found.rows)
    met = set().union(*map(pairs, found.rows))
    assert met == set().union(*map(pairs, legal))
    alone = {setting for row in found.rows for setting in row.items()}
    assert alone == {setting for row in legal for setting in row.items()}
    # What is said to be impossible is, and together with what is covered it is everything.
    assert not any(part.items() <= row.items() for part in found.infeasible for row in legal)
    said = [part.items() for part in found.infeasible]
    for row in whole:
        for pair in pairs(row) - met:
            assert any(part <= pair for part in said)


@settings(deadline=None, max_examples=30)
@given(worlds())
def test_the_same_again(world: tuple[dict[str, list[int]], Bans]) -> None:
    factors, bans = world
    one, other = (CoveringArray(factors, lambda row: may_be(row, bans)) for _ in range(2))
    assert (one.rows, one.infeasible) == (other.rows, other.infeasible)


def test_rows_are_few() -> None:
    factors = {name: range(4) for name in "abcdefgh"}
    found = CoveringArray(factors, lambda row: True)
    assert 16 <= len(found.rows) <= 40 < prod(map(len, factors.values()))


def test_rules_about_three_factors_do_not_hide_a_pair() -> None:
    factors = {name: [0, 1] for name in "abcd"}
    found = CoveringArray(factors, lambda row: not {"a": 1, "b": 1, "d": 0}.items() <= row.items())
    assert any(row["a"] == row["b"] == 1 for row in found.rows)
    assert not found.infeasible
