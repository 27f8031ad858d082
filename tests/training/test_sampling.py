"""Which samples an update uses: the same whatever the layout, each once, in nearly equal shares."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.parallel.replicate import share_weight
from labkit.training.sampling import BatchOrder, MicroBatchSampler

orders = st.builds(BatchOrder, st.integers(1, 60), st.integers(1, 40), st.integers(0, 2**31 - 1))
steps = st.integers(0, 200)


@settings(deadline=None)
@given(orders, steps, st.integers(1, 8), st.integers(1, 4))
def test_shares_partition_the_batch_in_order(order: BatchOrder, step: int, ranks: int, passes: int) -> None:
    update = order.update(step)
    assert update.shape == (order.batch,)
    shares = [order.micro_batches(step, rank, ranks, passes) for rank in range(ranks)]
    flat = np.concatenate([indices for share in shares for indices in share])
    np.testing.assert_array_equal(flat, update)
    sizes = [sum(map(len, share)) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    for share in shares:
        assert len(share) == passes
        lengths = [len(indices) for indices in share]
        assert max(lengths) - min(lengths) <= 1
    if order.batch >= ranks * passes:
        assert all(len(indices) for share in shares for indices in share), "no empty pass"


@settings(deadline=None)
@given(orders, st.integers(1, 4))
def test_every_epoch_sees_every_sample_once(order: BatchOrder, epochs: int) -> None:
    updates = -(-epochs * order.length // order.batch)
    seen = np.concatenate([order.update(step) for step in range(updates)])
    for epoch in range(epochs):
        part = seen[epoch * order.length : (epoch + 1) * order.length]
        np.testing.assert_array_equal(np.sort(part), np.arange(order.length))


@settings(deadline=None)
@given(orders, steps)
def test_the_order_is_a_function_of_seed_data_and_batch(order: BatchOrder, step: int) -> None:
    fresh = BatchOrder(order.length, order.batch, order.seed)
    np.testing.assert_array_equal(fresh.update(step), order.update(step))  # without the updates before it


def test_epochs_and_seeds_differ() -> None:
    order = BatchOrder(100, 100, seed=3)
    assert order.update(0).tolist() != order.update(1).tolist()
    assert order.update(0).tolist() != BatchOrder(100, 100, seed=4).update(0).tolist()
    assert order.update(0).tolist() != list(range(100))


@settings(deadline=None)
@given(orders, st.integers(0, 20), st.integers(0, 10), st.integers(1, 5), st.integers(1, 3))
def test_the_sampler_goes_on_where_a_checkpoint_stopped(
    order: BatchOrder, first: int, more: int, ranks: int, passes: int
) -> None:
    last = first + more
    for rank in range(ranks):
        resumed = list(MicroBatchSampler(order, first, last, rank, ranks, passes))
        whole = list(MicroBatchSampler(order, 0, last, rank, ranks, passes))
        assert resumed == whole[first * passes :]
        assert len(resumed) == len(MicroBatchSampler(order, first, last, rank, ranks, passes))


@settings(deadline=None)
@given(orders, steps, st.integers(1, 8), st.integers(1, 4))
def test_weighted_means_over_ranks_are_the_mean_over_the_batch(
    order: BatchOrder, step: int, ranks: int, passes: int
) -> None:
    """What one process computes, from what each rank computes: mean over ranks of the weighted means of its passes."""
    values = np.random.default_rng(0).normal(size=order.length)
    total = 0.0
    for rank in range(ranks):
        for indices in order.micro_batches(step, rank, ranks, passes):
            if len(indices):
                total += values[indices].mean() * share_weight(len(indices), order.batch, ranks) / ranks
    assert total == pytest.approx(values[order.update(step)].mean(), abs=1e-12)


@pytest.mark.parametrize(
    ("epochs", "length", "batch", "found"), [(1, 100, 10, 10), (0.5, 100, 10, 5), (0.001, 100, 10, 1)]
)
def test_epochs_become_steps(epochs: float, length: int, batch: int, found: int) -> None:
    assert BatchOrder(length, batch, 0).steps(epochs) == found


def test_no_data_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        BatchOrder(0, 4, 0)


@settings(deadline=None)
@given(orders, steps, st.lists(st.floats(0.01, 1.0), min_size=1, max_size=8), st.integers(1, 3))
def test_weighted_shares_partition_the_batch_too(order: BatchOrder, step: int, parts: list[float], passes: int) -> None:
    ranks = len(parts)
    if order.batch < ranks * passes:
        return
    weights = [part / sum(parts) for part in parts]
    shares = [order.micro_batches(step, rank, ranks, passes, weights) for rank in range(ranks)]
    flat = np.concatenate([indices for share in shares for indices in share])
    np.testing.assert_array_equal(flat, order.update(step))
    for share, weight in zip(shares, weights, strict=True):
        size = sum(map(len, share))
        assert size >= passes
        assert abs(size - passes - weight * (order.batch - ranks * passes)) <= 1
