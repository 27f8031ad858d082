"""A chain of blocks cut into pipeline stages, and which rank holds which stage.

A pp rank is a rank's index along the pipeline axis.
"""

from __future__ import annotations

from collections.abc import Sequence

from labkit.experiment.layout import Layout


def stages_of_rank(layout: Layout, pp_rank: int) -> list[int]:
    """Return the numbers of the stages that a pp rank holds, in the order of the chain."""
    return layout.stages(pp_rank)


def pp_rank_by_stage(layout: Layout) -> dict[int, int]:
    """Map the number of each stage to the pp rank that holds it."""
    return {number: pp_rank for pp_rank in range(layout.pp) for number in stages_of_rank(layout, pp_rank)}


def pp_rank_of_last_stage(layout: Layout) -> int:
    """Return the pp rank that holds the last stage."""
    return pp_rank_by_stage(layout)[layout.pp * layout.stages_per_rank - 1]


def minimal_maximum(costs: Sequence[float], parts: int) -> list[int]:
    """Return the lengths of `parts` non-empty consecutive groups of `costs` whose largest sum is as small as possible.

    Exact, by dynamic programming over (group, end): O(parts · n²). Raises ValueError with fewer costs than parts.
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


def split_into_stages(names: Sequence[str], lengths: Sequence[int]) -> list[list[str]]:
    """Return the names of the blocks of every stage; ValueError if `lengths` do not add up to all blocks."""
    if sum(lengths) != len(names):
        raise ValueError(f"stages of {list(lengths)} blocks do not make the {len(names)} blocks of the model")
    stages, begin = [], 0
    for length in lengths:
        stages.append(list(names[begin : begin + length]))
        begin += length
    return stages
