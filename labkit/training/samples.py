"""The training data as a DataLoader's processes fetch it: pass by pass, each with a seed of its own.

What is drawn for a sample (augmentation) then follows from seed, step, share and pass alone: it depends neither on the
number of loader processes nor on where a run was resumed, and no two shares draw the same (issue 11, A4, B 03).
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
class Pass:
    """The samples of one pass, and from which seed they are drawn."""

    indices: list[int]
    seed: int
    afterwards: int
    """From which seed the pass itself draws (dropout), where it is not drawn on from the samples' numbers."""


@dataclass(frozen=True)
class Failure:
    """Sent by a loader process in place of a batch: exceptions lose their words on the way."""

    sentence: str
    trace: str


class Loaded:
    """Training data by passes, in the rank itself or as a DataLoader's processes ask for it.

    `reseed` seeds the rank again for the pass itself, where several ranks work on the same samples: they draw the same
    for the samples and may draw other numbers for the rest. None where a rank has samples of its own.
    """

    def __init__(self, data: Data, reseed: Callable[[int], None] | None) -> None:
        self.data, self.reseed = data, reseed

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, requested: Pass) -> Batch | Failure:
        if get_worker_info() is None:
            return self._here(requested)
        seed_generators(requested.seed)
        try:
            return fetch(self.data, requested.indices, "train")
        except TaskFault as fault:
            return Failure(str(fault), traceback.format_exc())

    def _here(self, requested: Pass) -> Batch:
        if self.reseed is None:  # the step has been seeded
            return fetch(self.data, requested.indices, "train")
        seed_generators(requested.seed)
        batch = fetch(self.data, requested.indices, "train")
        self.reseed(requested.afterwards)
        return batch


class Passes:
    """The `sampler`'s passes with the seeds of each, which `seeds` gives for its number in the row."""

    def __init__(self, sampler: Any, seeds: Callable[[int], tuple[int, int]]) -> None:
        self.sampler, self.seeds = sampler, seeds

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Pass]:
        for number, indices in enumerate(self.sampler):
            yield Pass(indices, *self.seeds(number))


def as_it_is(batch: Batch | Failure) -> Batch | Failure:
    """Data sets hand out whole batches; there is nothing left to collate."""
    return batch


def received(batch: Batch | Failure) -> Batch:
    """What a loader process has sent; TaskFault if it could not fetch it."""
    if isinstance(batch, Failure):
        raise TaskFault(batch.sentence) from RuntimeError(batch.trace)
    return batch
