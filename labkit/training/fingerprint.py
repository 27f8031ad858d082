"""Have all ranks built the same task? Their fingerprints are compared before step 1 (issue 11, A4, B 01, B 02).

Every rank builds model and data for itself. Whatever does not come from a generator that starts from the seed (one of
its own without a seed, the time, the process number, the order of a set) makes ranks train different models, or train
on what others hold out. The whole model is compared, before a layout cuts it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from labkit.experiment.fault import TaskFault
from labkit.workloads.base import Data, Task
from labkit.workloads.fetch import fetch
from labkit.workloads.seed import seed_generators

SAMPLES = 6
"""Of the training data and of what is held out, so many samples are compared."""
MOST_S = 1.0
"""Samples that take longer than so are compared as far as both ranks have come (s)."""
WHOLE = 2**15
"""Tensors of up to so many numbers are looked at whole, of longer ones as many, evenly spaced."""
_SEEDED = (
    "draw what is random from the global generator of torch, numpy or random, which start from training.seed, or let "
    "the function take a parameter seed"
)


def digest(tensor: Tensor) -> str:
    """A hash of type, shape and numbers of a tensor, equal where they are; long tensors are looked at in places."""
    tensor = tensor.detach()
    head = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        return hashlib.blake2b(head, digest_size=8).hexdigest()
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
    if flat.numel() > WHOLE:
        flat = flat[:: -(-flat.numel() // WHOLE)]
    numbers = flat.contiguous().cpu().view(torch.uint8).numpy()
    hashed = hashlib.blake2b(head, digest_size=8)
    hashed.update(numbers.tobytes())
    return hashed.hexdigest()


@dataclass(frozen=True)
class Fingerprint:
    """What one rank has built: hashes by the words for what they are of."""

    parts: dict[str, str]

    @classmethod
    def of(cls, task: Task, seed: int) -> Fingerprint:
        """Look at weights, buffers, lengths and a few samples; the generators start from `seed` for each sample."""
        return cls(dict(_parts(task, seed)))

    @property
    def total(self) -> str:
        """One hash of everything."""
        return hashlib.blake2b(repr(sorted(self.parts.items())).encode(), digest_size=16).hexdigest()


def _parts(task: Task, seed: int) -> Iterator[tuple[str, str]]:
    for name, parameter in task.model.named_parameters():
        yield f"the weights of {name}", digest(parameter)
    for name, buffer in task.model.named_buffers():
        yield f"the buffer {name}", digest(buffer)
    for what, data in (("train", task.train), ("test", task.test)):
        yield f"the number of samples in {what}", str(len(data))
        deadline = time.perf_counter() + MOST_S
        for index in compared(data):
            if time.perf_counter() > deadline:
                break
            yield f"sample {index} of {what}", _sample(data, index, what, seed)


def compared(data: Data) -> list[int]:
    """Indices of the samples that are compared, evenly spaced from the first to the last."""
    return sorted({int(index) for index in np.linspace(0, len(data) - 1, SAMPLES)})


def _sample(data: Data, index: int, what: str, seed: int) -> str:
    seed_generators(seed)
    batch = fetch(data, [index], what)
    return " ".join(f"{name}:{digest(value)}" for name, value in sorted(batch.items()) if isinstance(value, Tensor))


def compare(mine: Fingerprint, again: Callable[[], Fingerprint]) -> list[str]:
    """Compare with all other ranks (collective); TaskFault with what differs, and between which ranks.

    Samples that are not even the same twice on one rank come from a generator that nobody can seed: these are no fault
    of the training data, where each rank should draw others; they are returned as notes. `again` takes the fingerprint
    once more.
    """
    total: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(total, mine.total)
    if len(set(total)) == 1:
        return []
    second = again().parts
    unsteady = {name for name, value in mine.parts.items() if second.get(name) != value}
    every: list[Any] = [None] * len(total)
    dist.all_gather_object(every, (mine.parts, unsteady))
    drawn = {name for _, names in every for name in names if " of train" in name}
    first = every[0][0]
    for rank, (parts, _) in enumerate(every):
        names = [name for name in (*first, *(set(parts) - set(first))) if name not in drawn]
        names = [name for name in names if not _cut_short(name, parts, first)]
        differing = [name for name in names if parts.get(name) != first.get(name)]
        if differing:
            raise TaskFault(_sentence(differing, first, parts, rank))
    return ["samples of train come from a generator without a seed: this run cannot be repeated"] if drawn else []


def _cut_short(name: str, *both: dict[str, str]) -> bool:
    """Is it a sample that one of them had no time to look at?"""
    return name.startswith("sample") and any(name not in parts for parts in both)


def _sentence(differing: list[str], first: dict[str, str], parts: dict[str, str], rank: int) -> str:
    name = differing[0]
    if name.startswith("the number of samples"):
        counts = f" ({first.get(name)} and {parts.get(name)})"
        return f"{name} differs between rank 0 and rank {rank}{counts}: {_SEEDED}"
    verb = "differ" if name.startswith("the weights") else "differs"
    more = f", as do {len(differing) - 1} other parts" if len(differing) > 1 else ""
    return f"{name} {verb} between rank 0 and rank {rank}{more}: {_SEEDED}"
