"""Covering arrays: few rows that contain every allowed pair of values of any two factors.

Most faults of combinations need two settings together, seldom three (Kuhn, Wallace and Gallo 2004, "Software Fault
Interactions"), and all pairs fit into few rows: k factors of v values take about v² · log k rows instead of v to the k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, TypeVar

Row = dict[str, Any]
"""Factor to value; a partial row lacks some factors."""
Setting = tuple[str, int]
"""A factor and the index of one of its values."""
Item = TypeVar("Item")
Allowed = Callable[[Row], bool]
"""Returns whether a row is allowed; for a partial row it returns False only if no completion is allowed."""


def greedy_cover(pool: Iterable[tuple[Item, set[Any]]]) -> list[Item]:
    """Return few items that together cover every element: repeatedly the item that covers the most uncovered ones."""
    candidates, chosen, covered = list(pool), [], set[Any]()
    while candidates:
        item, elements = max(candidates, key=lambda candidate: len(candidate[1] - covered))
        if elements <= covered:
            break
        chosen.append(item)
        covered |= elements
    return chosen


class CoveringArray:
    """The rows that cover all pairs of settings, and the settings and pairs that no allowed row contains.

    Deterministic and greedy: the next uncovered pair starts a row, and each further factor takes the value that covers
    the most uncovered pairs; if that is not allowed, the next best (depth first, so that every pair that can be covered
    is). Factors that decide most about what is allowed should come first.
    """

    def __init__(self, factors: Mapping[str, Sequence[Any]], allowed: Allowed) -> None:
        self._factors, self._allowed = factors, allowed
        self._names = list(factors)
        self.rows: list[Row] = []
        self.infeasible: list[Row] = []
        """Partial rows of one or two factors."""
        settings = [(name, index) for name in self._names for index in range(len(factors[name]))]
        self._uncovered = dict.fromkeys(
            frozenset(pair) for pair in combinations(settings, 2) if pair[0][0] != pair[1][0]
        )
        self._uncovered_counts: dict[Setting, int] = dict.fromkeys(settings, 0)
        """Number of uncovered pairs that contain a setting."""
        for pair in self._uncovered:
            for setting in pair:
                self._uncovered_counts[setting] += 1
        for setting in settings:  # alone first: a setting that is never allowed is reported once, not in every pair
            if not self._cover(setting):
                for pair in [pair for pair in self._uncovered if setting in pair]:
                    self._mark_covered(pair)
        for pair in list(self._uncovered):
            if pair in self._uncovered and not self._cover(*sorted(pair, key=lambda each: self._names.index(each[0]))):
                self._mark_covered(pair)

    def _cover(self, *pinned: Setting) -> bool:
        """Add a row with these settings unless there is one; if none is allowed, record that and return False."""
        if len(pinned) == 1 and any(self._contains(row, *pinned) for row in self.rows):
            return True
        chosen = self._complete(dict(pinned), 0)
        if chosen is None:
            self.infeasible.append(self._row(dict(pinned)))
            return False
        self.rows.append(self._row(chosen))
        for pair in map(frozenset, combinations(chosen.items(), 2)):
            if pair in self._uncovered:
                self._mark_covered(pair)
        return True

    def _complete(self, chosen: dict[str, int], depth: int) -> dict[str, int] | None:
        """Return an allowed completion of the chosen settings, from factor number `depth` on; None if there is none."""
        if not self._allowed(self._row(chosen)):
            return None
        while depth < len(self._names) and self._names[depth] in chosen:
            depth += 1
        if depth == len(self._names):
            return chosen
        name = self._names[depth]

        def gain(index: int) -> tuple[int, int]:
            newly_covered = sum(frozenset(((name, index), setting)) in self._uncovered for setting in chosen.items())
            return newly_covered, self._uncovered_counts[name, index]

        for index in sorted(range(len(self._factors[name])), key=gain, reverse=True):
            completed = self._complete({**chosen, name: index}, depth + 1)
            if completed is not None:
                return completed
        return None

    def _mark_covered(self, pair: frozenset[Setting]) -> None:
        """Remove a pair from the uncovered ones."""
        del self._uncovered[pair]
        for setting in pair:
            self._uncovered_counts[setting] -= 1

    def _row(self, chosen: Mapping[str, int]) -> Row:
        """Return the values of the chosen settings, in the order of the factors."""
        return {name: self._factors[name][chosen[name]] for name in self._names if name in chosen}

    def _contains(self, row: Row, setting: Setting) -> bool:
        """Return whether a row contains a setting."""
        name, index = setting
        return bool(row[name] == self._factors[name][index])
