"""The micro-batches of one rank, in order and on its device, and the seeds from which each of them draws.

Everything random in a step follows from the seed of the run, the step and the rank, so that a resumed run repeats it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch.utils.data import DataLoader

from labkit.experiment import Experiment
from labkit.training.copy_stream import CopyStream
from labkit.training.loaders import end_with_rank
from labkit.training.runtime import Runtime
from labkit.training.samples import MicroBatchDataset, SeededMicroBatches, no_collate, unwrap_batch
from labkit.training.sampling import BatchOrder, MicroBatchSampler
from labkit.training.shares import Shares
from labkit.workloads.base import Batch, Data
from labkit.workloads.fetch import fetch

_SEED_STRIDE = 0x9E3779B97F4A7C15
"""Difference between the seeds of two micro-batches of a step; so large that no seeds of other steps are near."""


class MicroBatches:
    """The training samples of one rank, a micro-batch at a time."""

    def __init__(self, experiment: Experiment, data: Data, runtime: Runtime, order: BatchOrder, shares: Shares) -> None:
        self._training, self._data = experiment.training, data
        self._runtime, self._order, self._shares = runtime, order, shares
        self._passes = experiment.gradients.accumulation

    def seed(self, step: int, share: int) -> int:
        """Return the seed of a step and share, for dropout and the like."""
        return (self._training.seed * 1_000_003 + step) * 4099 + share

    def of_share(self, step: int, share: int, shares: int) -> Iterator[Batch]:
        """Yield the micro-batches of share `share` of the batch of one step."""
        for indices in self._order.micro_batches(step, share, shares, self._passes):
            yield self._runtime.place(fetch(self._data, indices.tolist(), "train"))

    def from_step(self, first: int, steps: int) -> Iterator[Batch]:
        """Return an iterator over the micro-batches of this rank's share, from step `first` up to step `steps`.

        Without loader processes the data set is called directly: a DataLoader in this process could not prefetch, and
        costs more than fetching a batch of small images does.
        """
        share, shares = self._runtime.mesh.data_shard
        weights = (lambda: self._shares.weights) if self._shares.follow else (lambda: None)
        sampler = MicroBatchSampler(self._order, first, steps, share, shares, self._passes, weights)
        data = MicroBatchDataset(self._data, self._runtime.seed if self._runtime.is_sharded else None)
        passes = SeededMicroBatches(sampler, partial(self._seeds_of_pass, first))
        workers, cuda = self._training.loader_workers, self._runtime.device.type == "cuda"
        if not workers and not cuda:
            return map(self._runtime.place, map(unwrap_batch, map(data.__getitems__, passes)))
        loader: Any = DataLoader(
            data,  # type: ignore[arg-type]
            batch_sampler=passes,  # type: ignore[arg-type]
            collate_fn=no_collate,  # type: ignore[arg-type]
            num_workers=workers,
            worker_init_fn=partial(end_with_rank, os.getpid()) if workers else None,
            pin_memory=cuda,
        )
        device, place = self._runtime.device, self._runtime.place
        return map(CopyStream(device, place).place if cuda else place, map(unwrap_batch, loader))

    def _seeds_of_pass(self, first: int, number: int) -> tuple[int, int]:
        """Return the seeds of micro-batch `number` since step `first`: one for its samples, one for everything else."""
        step, part = divmod(number, self._passes)
        places = (self._runtime.mesh.data_shard[0], self._runtime.rank)
        states = (self.seed(first + step, place) for place in places)
        for_samples, for_pass = ((state + part * _SEED_STRIDE) % 2**63 for state in states)
        return for_samples, for_pass
