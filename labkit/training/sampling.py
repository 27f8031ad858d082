"""Which samples an update uses: a function of seed, data and global batch alone, whatever the layout.

Updates walk through an endless row of permutations, one an epoch. Update t takes the positions [t·B, (t+1)·B), a rank
its contiguous share of them, an accumulation pass its part of the share. So every layout sees the same samples in the
same update, and a resumed run goes on where it stopped without any saved state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


class BatchOrder:
    """The order of the samples. `length` samples, `batch` of them an update."""

    def __init__(self, length: int, batch: int, seed: int) -> None:
        if length < 1:
            raise ValueError("the training data is empty")
        self.length, self.batch, self.seed = length, batch, seed
        self._permutation = lru_cache(maxsize=4)(self._make_permutation)

    def _make_permutation(self, epoch: int) -> Indices:
        return np.random.default_rng([self.seed, epoch]).permutation(self.length)

    def steps(self, epochs: float) -> int:
        """Updates in that many passes over the data, at least one."""
        return max(1, round(epochs * self.length / self.batch))

    def update(self, step: int) -> Indices:
        """Indices of the samples of update `step`, shape [batch]."""
        begin, end = step * self.batch, (step + 1) * self.batch
        parts = []
        while begin < end:
            epoch, offset = divmod(begin, self.length)
            part = self._permutation(epoch)[offset : offset + end - begin]
            parts.append(part)
            begin += len(part)
        return np.concatenate(parts)

    def passes(
        self, step: int, rank: int, ranks: int, passes: int, weights: Sequence[float] | None = None
    ) -> list[Indices]:
        """The accumulation passes of one rank's share of update `step`; sizes differ by at most one.

        `weights`: parts of the batch by rank, which sum up to 1; each rank gets at least one sample a pass.
        """
        whole = self.update(step)
        if weights is None:
            return np.array_split(np.array_split(whole, ranks)[rank], passes)
        return np.array_split(np.split(whole, borders(len(whole), weights, passes))[rank], passes)


def borders(samples: int, weights: Sequence[float], least: int) -> NDArray[np.int64]:
    """Where a batch is cut into parts as large as `weights` say, none below `least`: ends of all but the last."""
    free = samples - least * len(weights)
    ends = np.rint(np.cumsum(np.asarray(weights) * free)).astype(np.int64) + least * np.arange(1, len(weights) + 1)
    return np.asarray(ends[:-1])


class MicroBatchSampler:
    """For a DataLoader: the index lists of all passes of one rank from update `first` to `last`, in order.

    `weights` tells the ranks' parts of the batch when they are needed; None for equal ones.
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
            for indices in self.order.passes(step, self.rank, self.ranks, self.passes, self.weights()):
                yield indices.tolist()
