"""Fingerprints of the task, compared before step 1: all ranks must have built the same task (issue 11, A4, B 01, B 02).

Every rank builds model and data for itself. Any value that does not come from a generator seeded by the experiment (but
from an unseeded one, the time, the process id, the order of a set) makes ranks train different models, or train on
samples that other ranks hold out. The whole model is compared, before a layout shards it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from labkit.experiment.fault import TaskFault
from labkit.workloads.base import Data, Task, TensorData
from labkit.workloads.fetch import fetch
from labkit.workloads.held import tensors_held
from labkit.workloads.samples import Cast, PairData
from labkit.workloads.seed import seed_generators

SAMPLES = 6
"""Number of samples that are compared, of the training data and of the held-out data."""
MOST_S = 1.0
"""Time limit for reading these samples (s); beyond it, only the samples that both ranks have read are compared."""
MORE_SAMPLES, MORE_S = 250, 0.03
"""Number of further samples that are compared if the data is not in memory, and the time limit for them (s)."""
MOST_BYTES = 2**28
"""Size up to which every value of a tensor is hashed (bytes); larger ones are sampled at `PLACES` even intervals."""
PLACES = 2**15
_ROW = 1024
"""Number of 64-bit words that are summed with random weights before they are hashed, which is six times as fast."""
SEEDED = (
    "draw random numbers from the global generators of torch, numpy or random, which are seeded with training.seed, or "
    "give the function a parameter seed"
)


def digest(tensor: Tensor) -> str:
    """Return a hash of dtype, shape and values; large tensors, and those on a GPU, are sampled at `PLACES` places."""
    tensor = tensor.detach()
    hashed = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=8)
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        return hashed.hexdigest()
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
    limit = MOST_BYTES // flat.element_size() if flat.device.type == "cpu" else PLACES
    if flat.numel() > limit:
        flat = flat[:: -(-flat.numel() // PLACES)]
    numbers = flat.contiguous().cpu().view(torch.uint8).numpy()
    rows = len(numbers) // (8 * _ROW)
    if rows:
        hashed.update((numbers[: rows * 8 * _ROW].view(np.int64).reshape(rows, _ROW) @ _weights()).tobytes())
    hashed.update(numbers[rows * 8 * _ROW :].tobytes())
    return hashed.hexdigest()


@cache
def _weights() -> np.ndarray[Any, Any]:
    """Return odd weights, the same in every process: a row's sum changes with each of its values and their order."""
    return np.random.default_rng(20261127).integers(-(2**62), 2**62, _ROW) | 1


@dataclass(frozen=True)
class Fingerprint:
    """Hashes of what one rank has built."""

    parts: dict[str, str]
    """Hashes by a description of what was hashed, such as "sample 3 of train"."""
    more: dict[str, str] = field(default_factory=dict, compare=False)
    """Hashes of further samples, as many as time allowed: compared between ranks, but not part of `total`."""

    @classmethod
    def of(cls, task: Task, seed: int) -> Fingerprint:
        """Hash weights, buffers, lengths and samples; all generators are seeded with `seed` before each sample."""
        return cls(dict(_parts(task, seed)), dict(_further_samples(task, seed)))

    @property
    def total(self) -> str:
        """Single hash of all parts."""
        return hashlib.blake2b(repr(sorted(self.parts.items())).encode(), digest_size=16).hexdigest()


def _parts(task: Task, seed: int) -> Iterator[tuple[str, str]]:
    for name, parameter in task.model.named_parameters():
        yield f"the weights of {name}", digest(parameter)
        yield f"whether {name} is trained", str(parameter.requires_grad)
    for name, buffer in task.model.named_buffers():
        yield f"the buffer {name}", digest(buffer)
    loss = getattr(task, "loss_module", None)
    if isinstance(loss, nn.Module):
        for name, tensor in (*loss.named_parameters(), *loss.named_buffers()):
            yield f"{name} of the loss", digest(tensor)
    for what, data in (("train", task.train), ("test", task.test)):
        yield f"the number of samples in {what}", str(len(data))
        deadline = time.perf_counter() + MOST_S
        for index in compared_indices(data):
            if time.perf_counter() > deadline:
                break
            yield f"sample {index} of {what}", _sample(data, index, what, seed)
        yield from hash_in_memory(data, what)


def hash_in_memory(data: Data, what: str) -> Iterator[tuple[str, str]]:
    """Yield a name and the hash of every tensor that data in memory consists of; nothing for other data."""
    for name, tensor in in_memory(data):
        yield f"the whole of {name} of {what}", digest(tensor)


def in_memory(data: Data) -> list[tuple[str, Tensor]]:
    """Return name and tensor of all that the samples are read from if it is known to be in memory; otherwise [].

    A user's data set may hold more than its samples, such as scratch memory, so only known classes are considered.
    """
    if isinstance(data, Cast):
        return in_memory(data.data)
    if isinstance(data, TensorData):
        return list(data.tensors.items())
    if isinstance(data, PairData):
        return _dataset_tensors(data.dataset)
    if type(data).__module__.startswith("labkit."):
        return [(place.removesuffix(" of ") or "data", tensor) for place, tensor in tensors_held(data, "")]
    return []


def _dataset_tensors(dataset: Any) -> list[tuple[str, Tensor]]:
    indices: list[tuple[str, Tensor]] = []
    while type(dataset) is Subset:
        indices.append(("the indices", torch.as_tensor(dataset.indices)))
        dataset = dataset.dataset
    if type(dataset) is not TensorDataset:
        return []
    return [*indices, *((f"tensor {number}", tensor) for number, tensor in enumerate(dataset.tensors))]


def _further_samples(task: Task, seed: int) -> Iterator[tuple[str, str]]:
    """Yield hashes of more samples if the data is not in memory, evenly spaced however early the time limit ends it."""
    for what, data in (("train", task.train), ("test", task.test)):
        deadline = time.perf_counter() + MORE_S
        for index in () if in_memory(data) else evenly_spaced(len(data)):
            if time.perf_counter() > deadline:
                break
            yield f"sample {index} of {what}", _sample(data, index, what, seed)


def evenly_spaced(length: int) -> list[int]:
    """Return indices below `length`, ordered so that the first few, however many, are far apart (golden ratio)."""
    step = (5**0.5 - 1) / 2
    return list(dict.fromkeys(int((number * step) % 1 * length) for number in range(1, min(length, MORE_SAMPLES) + 1)))


def compared_indices(data: Data) -> list[int]:
    """Return the indices of the samples that are compared, evenly spaced from the first to the last."""
    return sorted({int(index) for index in np.linspace(0, len(data) - 1, SAMPLES)})


def _sample(data: Data, index: int, what: str, seed: int) -> str:
    seed_generators(seed)
    batch = fetch(data, [index], what)
    return " ".join(f"{name}:{digest(value)}" for name, value in sorted(batch.items()) if isinstance(value, Tensor))


def compare(mine: Fingerprint, again: Callable[[], Fingerprint]) -> list[str]:
    """Compare with all other ranks (collective); raise TaskFault if they differ, with the part and the ranks.

    Training samples that differ between two readings on the same rank come from an unseeded generator. That is allowed,
    since each rank should augment its samples differently; a note is returned instead. `again` computes the fingerprint
    a second time.
    """
    totals: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(totals, (mine.total, mine.more))
    if len({total for total, _ in totals}) == 1 and all(_agree(more, totals[0][1]) for _, more in totals):
        return []
    first_time, second_time = ({**each.more, **each.parts} for each in (mine, again()))
    not_repeatable = {name for name, value in first_time.items() if second_time.get(name, value) != value}
    by_rank: list[Any] = [None] * len(totals)
    dist.all_gather_object(by_rank, (first_time, not_repeatable))
    unseeded = {name for _, names in by_rank for name in names if " of train" in name}
    first = by_rank[0][0]
    for rank, (parts, _) in enumerate(by_rank):
        names = [name for name in (*first, *(set(parts) - set(first))) if name not in unseeded]
        names = [name for name in names if not _cut_short(name, parts, first)]
        differing = [name for name in names if parts.get(name) != first.get(name)]
        if differing:
            raise TaskFault(_sentence(differing, first, parts, rank))
    return ["samples of train come from an unseeded generator: this run cannot be reproduced"] if unseeded else []


def _agree(mine: dict[str, str], theirs: dict[str, str]) -> bool:
    """Return whether the samples that both ranks have hashed are the same."""
    return all(mine[name] == theirs[name] for name in mine.keys() & theirs.keys())


def _cut_short(name: str, *both: dict[str, str]) -> bool:
    """Return whether `name` is a sample that one of the two ranks had no time to hash."""
    return name.startswith("sample") and any(name not in parts for parts in both)


def _sentence(differing: list[str], first: dict[str, str], parts: dict[str, str], rank: int) -> str:
    name = differing[0]
    if name.startswith("the number of samples"):
        counts = f" ({first.get(name)} and {parts.get(name)})"
        return f"{name} differs between rank 0 and rank {rank}{counts}: {SEEDED}"
    verb = "differ" if name.startswith("the weights") else "differs"
    others = len(differing) - 1
    more = f", as do {others} other parts" if others > 1 else ", as does one other part" if others else ""
    return f"{name} {verb} between rank 0 and rank {rank}{more}: {SEEDED}"
