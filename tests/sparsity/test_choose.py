"""Which weights are chosen: exactly as many as were asked for, and those that the rule names."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.sparsity import block, n_m
from labkit.sparsity.choose import drop_and_grow, mask_of_largest, random_mask
from labkit.sparsity.distribution import kept_counts

SHAPES = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=5)


@given(st.integers(1, 200), st.floats(0, 1), st.integers(0, 9))
def test_the_largest_are_kept_and_exactly_so_many(size: int, part: float, seed: int) -> None:
    scores = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    mask = mask_of_largest(scores, round(part * size))
    assert mask.sum() == round(part * size)
    if mask.any() and not mask.all():
        assert scores[mask].min() >= scores[~mask].max()


def test_equal_scores_are_told_apart() -> None:
    assert mask_of_largest(torch.ones(4, 5), 7).sum() == 7


@given(st.integers(0, 50), st.floats(0, 1), st.integers(0, 9))
def test_as_many_come_as_go(count: int, part: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = random_mask((8, 10), count, seed)
    weight = torch.randn(8, 10, generator=generator) * mask
    growth = torch.randn(8, 10, generator=generator)
    changes = round(part * count)
    after = drop_and_grow(mask, weight, growth, changes)
    assert after.sum() == count
    stays = mask_of_largest(weight.abs().masked_fill(~mask, -1), count - changes)
    assert (after & stays).sum() == count - changes, "the largest weights stay"
    new = after & ~stays
    if new.any() and (~after).any():
        assert growth.abs()[new].min() >= growth.abs()[~after].max(), "and those that grow most come"


@given(SHAPES, st.floats(0.05, 0.99))
def test_erk_keeps_the_same_number_of_weights_in_all(shapes: list[tuple[int, int]], sparsity: float) -> None:
    layers = {str(number): shape for number, shape in enumerate(shapes)}
    counts = kept_counts(layers, sparsity, "erk")
    wanted = (1 - sparsity) * sum(map(prod, shapes))
    assert abs(sum(counts.values()) - wanted) <= len(shapes)
    assert all(0 <= counts[name] <= prod(shape) for name, shape in layers.items())


def test_erk_spares_small_layers() -> None:
    counts = kept_counts({"small": (8, 8), "large": (256, 256)}, 0.9, "erk")
    assert counts["small"] / 64 > 4 * counts["large"] / 65536
    uniform = kept_counts({"small": (10, 10), "large": (100, 100)}, 0.9, "uniform")
    assert uniform == {"small": 10, "large": 1000}


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9))
def test_blocks_are_whole(rows: int, columns: int, size: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    grid = block.block_means(weight, size)
    assert grid.shape == (-(-rows // size), -(-columns // size))
    assert grid[0, 0] == pytest.approx(weight[:size, :size].abs().mean().item(), rel=1e-5)
    assert grid[-1, -1] == pytest.approx(
        weight[(grid.shape[0] - 1) * size :, (grid.shape[1] - 1) * size :].abs().mean().item(), rel=1e-5
    )
    mask = block.expand_blocks(mask_of_largest(grid, grid.numel() // 2), weight, size)
    for i in range(0, rows, size):
        for j in range(0, columns, size):
            part = mask[i : i + size, j : j + size]
            assert part.all() or not part.any()


@settings(deadline=None)
@given(st.integers(1, 7), st.sampled_from([(1, 2), (2, 4), (4, 8), (1, 4)]), st.booleans())
def test_comparing_all_pairs_ranks_as_topk_does(rows: int, nm: tuple[int, int], ties: bool) -> None:
    n, m = nm
    groups = torch.randn(rows, m, generator=torch.Generator().manual_seed(rows), dtype=torch.float64).abs()
    groups = groups.round() if ties else groups
    mask = n_m._by_comparing(groups, n)
    assert (mask.sum(1) == n).all()
    torch.testing.assert_close((groups * mask).sum(1), groups.topk(n, 1).values.sum(1))


@given(st.integers(1, 7), st.integers(1, 30), st.sampled_from([(1, 2), (2, 4), (4, 8)]))
def test_of_every_m_inputs_n_are_used(rows: int, columns: int, nm: tuple[int, int]) -> None:
    n, m = nm
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    mask = n_m.n_of_m(weight, n, m)
    whole = columns // m * m
    groups = mask[:, :whole].reshape(-1, m)
    assert (groups.sum(1) == n).all()
    assert mask[:, whole:].all()
    values = weight.abs()[:, :whole].reshape(-1, m)
    assert (values.masked_fill(~groups, torch.inf).amin(1) >= values.masked_fill(groups, 0).amax(1)).all()
