"""A chain of blocks cut into pipeline stages, and which rank holds which stage."""

from __future__ import annotations

from collections.abc import Sequence

from labkit.experiment.layout import V_SHAPED, Layout

__all__ = ["SEVERAL", "SPLITTING", "V_SHAPED", "groups", "held_by", "held_last", "minimal_maximum", "places"]

SPLITTING = ("interleaved_zero_bubble", "zbv", "dualpipev")
"""Schedules that compute the gradients of inputs and of weights at different times."""
SEVERAL = ("interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble")


def held_by(layout: Layout, place: int) -> list[int]:
    """Numbers of the stages that the rank at `place` along pp holds, in the order of the chain."""
    return layout.stages(place)


def places(layout: Layout) -> dict[int, int]:
    """Place along pp of the rank that holds each stage."""
    return {number: place for place in range(layout.pp) for number in held_by(layout, place)}


def held_last(layout: Layout) -> int:
    """Place along pp of the rank that holds the last stage."""
    return places(layout)[layout.pp * layout.stages_per_rank - 1]


def minimal_maximum(costs: Sequence[float], parts: int) -> list[int]:
    """Lengths of `parts` consecutive groups of `costs` whose most expensive one is as cheap as possible; none is empty.

    Exact, by dynamic programming over (group, end): O(parts · n²). ValueError with fewer costs than parts.
    """
    count = len(costs)
    if parts > count:
        raise ValueError(f"{count} blocks cannot be cut into {parts} stages")
    before = [0.0]
    for cost in costs:
        before.append(before[-1] + cost)
    infinite = float("inf")
    best = [[infinite] * (count + 1) for _ in range(parts + 1)]
    cut_at = [[0] * (count + 1) for _ in range(parts + 1)]
    best[0][0] = 0.0
    for part in range(1, parts + 1):
        for end in range(part, count - (parts - part) + 1):
            for begin in range(part - 1, end):
                worst = max(best[part - 1][begin], before[end] - before[begin])
                if worst < best[part][end]:
                    best[part][end], cut_at[part][end] = worst, begin
    lengths, end = [], count
    for part in range(parts, 0, -1):
        begin = cut_at[part][end]
        lengths.append(end - begin)
        end = begin
    return lengths[::-1]


def groups(names: Sequence[str], lengths: Sequence[int]) -> list[list[str]]:
    """The names of the blocks of every stage."""
    if sum(lengths) != len(names):
        raise ValueError(f"stages of {list(lengths)} blocks do not make the {len(names)} blocks of the model")
    found, begin = [], 0
    for length in lengths:
        found.append(list(names[begin : begin + length]))
        begin += length
    return found
