"""The training data as a DataLoader's worker processes fetch it: by micro-batch, each with its own seed.

Random numbers for a sample (augmentation) therefore depend only on seed, step, share of the batch and micro-batch. They
depend neither on the number of loader processes nor on where a run was resumed, and no two shares use the same ones
(issue 11, A4, B 03).
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import get_worker_info

from labkit.experiment.fault import TaskFault
from labkit.workloads.base import Batch, Data
from labkit.workloads.fetch import fetch
from labkit.workloads.seed import seed_generators


@dataclass(frozen=True)
class MicroBatch:
    """Indices of the samples of one micro-batch, and the seeds of its random numbers."""

    indices: list[int]
    seed: int
    seed_of_pass: int
    """Seed of the pass itself (dropout), used if `MicroBatchDataset.reseed` is set."""


@dataclass(frozen=True)
class LoaderFailure:
    """Sent by a loader process in place of a batch, because exceptions lose their message between processes."""

    sentence: str
    trace: str


class MicroBatchDataset:
    """Training data by micro-batch, fetched in the rank itself or in the worker processes of a DataLoader.

    `reseed` seeds the rank again for the pass itself if several ranks work on the same samples: they need the same
    random numbers for the samples and may need different ones for the rest. It is None if a rank has its own samples.
    """

    def __init__(self, data: Data, reseed: Callable[[int], None] | None) -> None:
        self.data, self.reseed = data, reseed

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, requested: MicroBatch) -> Batch | LoaderFailure:
        if get_worker_info() is None:
            return self._fetch_in_rank(requested)
        seed_generators(requested.seed)
        try:
            return fetch(self.data, requested.indices, "train")
        except TaskFault as fault:
            return LoaderFailure(str(fault), traceback.format_exc())

    def _fetch_in_rank(self, requested: MicroBatch) -> Batch:
        if self.reseed is None:  # the generators were seeded for the step
            return fetch(self.data, requested.indices, "train")
        seed_generators(requested.seed)
        batch = fetch(self.data, requested.indices, "train")
        self.reseed(requested.seed_of_pass)
        return batch


class SeededMicroBatches:
    """Yields the micro-batches of `sampler`; `seeds` maps the index of a micro-batch to its two seeds."""

    def __init__(self, sampler: Any, seeds: Callable[[int], tuple[int, int]]) -> None:
        self.sampler, self.seeds = sampler, seeds

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[MicroBatch]:
        for number, indices in enumerate(self.sampler):
            yield MicroBatch(indices, *self.seeds(number))


def no_collate(batch: Batch | LoaderFailure) -> Batch | LoaderFailure:
    """Return `batch` unchanged: data sets return whole batches, so there is nothing to collate."""
    return batch


def unwrap_batch(batch: Batch | LoaderFailure) -> Batch:
    """Return the batch that a loader process has sent; raise TaskFault if it could not fetch it."""
    if isinstance(batch, LoaderFailure):
        raise TaskFault(batch.sentence) from RuntimeError(batch.trace)
    return batch
