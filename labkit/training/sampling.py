"""Which samples an optimizer step uses: a function of seed, data and global batch size, independent of the layout.

Steps walk through an endless sequence of permutations, one per epoch. Step t takes the positions [t·B, (t+1)·B), a rank
takes its contiguous share of them, and a micro-batch takes a part of that share. So every layout sees the same samples
in the same step, and a run resumes where it stopped without any saved state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


class BatchOrder:
    """Order of `length` training samples, `batch` of them per optimizer step."""

    def __init__(self, length: int, batch: int, seed: int) -> None:
        if length < 1:
            raise ValueError("the training data is empty")
        self.length, self.batch, self.seed = length, batch, seed
        self._permutation = lru_cache(maxsize=4)(self._make_permutation)

    def _make_permutation(self, epoch: int) -> Indices:
        return np.random.default_rng([self.seed, epoch]).permutation(self.length)

    def steps(self, epochs: float) -> int:
        """Return the number of optimizer steps in `epochs` passes over the data, at least one."""
        return max(1, round(epochs * self.length / self.batch))

    def update(self, step: int) -> Indices:
        """Return the indices of the samples of optimizer step `step`, shape [batch]."""
        begin, end = step * self.batch, (step + 1) * self.batch
        parts = []
        while begin < end:
            epoch, offset = divmod(begin, self.length)
            part = self._permutation(epoch)[offset : offset + end - begin]
            parts.append(part)
            begin += len(part)
        return np.concatenate(parts)

    def micro_batches(
        self, step: int, rank: int, ranks: int, passes: int, weights: Sequence[float] | None = None
    ) -> list[Indices]:
        """Return the `passes` micro-batches of one rank in step `step`, as indices; their sizes differ by at most one.

        `weights` are the ranks' fractions of the batch, with sum 1; each rank gets at least one sample per micro-batch.
        By default all ranks get equal shares.
        """
        batch = self.update(step)
        if weights is None:
            return np.array_split(np.array_split(batch, ranks)[rank], passes)
        return np.array_split(np.split(batch, borders(len(batch), weights, passes))[rank], passes)


def borders(samples: int, weights: Sequence[float], least: int) -> NDArray[np.int64]:
    """Return the split points of a batch in parts proportional to `weights`, each of at least `least` samples."""
    free = samples - least * len(weights)
    ends = np.rint(np.cumsum(np.asarray(weights) * free)).astype(np.int64) + least * np.arange(1, len(weights) + 1)
    return np.asarray(ends[:-1])


class MicroBatchSampler:
    """Batch sampler for a DataLoader: indices of one rank's micro-batches in the steps [`first`, `last`), in order.

    `weights` is called for each step and returns the ranks' fractions of the batch, or None for equal shares.
    """

    def __init__(
        self,
        order: BatchOrder,
        first: int,
        last: int,
        rank: int,
        ranks: int,
        passes: int,
        weights: Callable[[], Sequence[float] | None] = lambda: None,
    ) -> None:
        self.order, self.first, self.last = order, first, last
        self.rank, self.ranks, self.passes, self.weights = rank, ranks, passes, weights

    def __len__(self) -> int:
        return (self.last - self.first) * self.passes

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.last):
            for indices in self.order.micro_batches(step, self.rank, self.ranks, self.passes, self.weights()):
                yield indices.tolist()
