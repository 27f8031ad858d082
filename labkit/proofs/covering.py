"""Covering arrays: few rows in which every pair of values of any two factors meets that may meet at all.

Most faults of combinations need two settings to meet, seldom three (Kuhn, Wallace and Gallo 2004, "Software Fault
Interactions"), and all pairs fit into few rows: k factors of v values take about v² · log k rows instead of v to the k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, TypeVar

Row = dict[str, Any]
"""Factor to value; a partial row lacks some factors."""
Setting = tuple[str, int]
"""A factor and the place of one of its values."""
Some = TypeVar("Some")
Allowed = Callable[[Row], bool]
"""May this row be? Asked for partial rows too, and False there only if no completion may be."""


def greedy_cover(pool: Iterable[tuple[Some, set[Any]]]) -> list[Some]:
    """Few of these that together show all that any of them shows: always the one that shows most that is new."""
    left, chosen, met = list(pool), [], set[Any]()
    while left:
        one, shown = max(left, key=lambda each: len(each[1] - met))
        if shown <= met:
            break
        chosen.append(one)
        met |= shown
    return chosen


class CoveringArray:
    """The rows that cover all pairs, and the settings and pairs of settings that no row may hold.

    Deterministic and greedy: the next uncovered pair starts a row, each further factor takes the value that meets most
    that has not been met yet, and where that may not be, the next best one (depth first, so that what can be covered
    is). Factors that decide most about what is allowed stand first.
    """

    def __init__(self, factors: Mapping[str, Sequence[Any]], allowed: Allowed) -> None:
        self._factors, self._allowed = factors, allowed
        self._names = list(factors)
        self.rows: list[Row] = []
        self.impossible: list[Row] = []
        """Partial rows of one or two factors."""
        settings = [(name, place) for name in self._names for place in range(len(factors[name]))]
        self._open = dict.fromkeys(frozenset(pair) for pair in combinations(settings, 2) if pair[0][0] != pair[1][0])
        self._wanted: dict[Setting, int] = dict.fromkeys(settings, 0)
        """How many open pairs a setting is in."""
        for pair in self._open:
            for setting in pair:
                self._wanted[setting] += 1
        for setting in settings:  # alone, so that what may never be is said once and not in every pair
            if not self._cover(setting):
                for pair in [pair for pair in self._open if setting in pair]:
                    self._close(pair)
        for pair in list(self._open):
            if pair in self._open and not self._cover(*sorted(pair, key=lambda each: self._names.index(each[0]))):
                self._close(pair)

    def _cover(self, *pinned: Setting) -> bool:
        """Add a row with these settings unless one is there; False, and a note, if there can be none."""
        if len(pinned) == 1 and any(self._holds(row, *pinned) for row in self.rows):
            return True
        chosen = self._complete(dict(pinned), 0)
        if chosen is None:
            self.impossible.append(self._row(dict(pinned)))
            return False
        self.rows.append(self._row(chosen))
        for pair in map(frozenset, combinations(chosen.items(), 2)):
            if pair in self._open:
                self._close(pair)
        return True

    def _complete(self, chosen: dict[str, int], depth: int) -> dict[str, int] | None:
        if not self._allowed(self._row(chosen)):
            return None
        while depth < len(self._names) and self._names[depth] in chosen:
            depth += 1
        if depth == len(self._names):
            return chosen
        name = self._names[depth]

        def gain(place: int) -> tuple[int, int]:
            met = sum(frozenset(((name, place), other)) in self._open for other in chosen.items())
            return met, self._wanted[name, place]

        for place in sorted(range(len(self._factors[name])), key=gain, reverse=True):
            found = self._complete({**chosen, name: place}, depth + 1)
            if found is not None:
                return found
        return None

    def _close(self, pair: frozenset[Setting]) -> None:
        del self._open[pair]
        for setting in pair:
            self._wanted[setting] -= 1

    def _row(self, chosen: Mapping[str, int]) -> Row:
        return {name: self._factors[name][chosen[name]] for name in self._names if name in chosen}

    def _holds(self, row: Row, setting: Setting) -> bool:
        name, place = setting
        return bool(row[name] == self._factors[name][place])
