"""Have all ranks built the same task? Their fingerprints are compared before step 1 (issue 11, A4, B 01, B 02).

Every rank builds model and data for itself. Whatever does not come from a generator that starts from the seed (one of
its own without a seed, the time, the process number, the order of a set) makes ranks train different models, or train
on what others hold out. The whole model is compared, before a layout cuts it.
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
"""Of the training data and of what is held out, so many samples are compared."""
MOST_S = 1.0
"""Samples that take longer than so are compared as far as both ranks have come (s)."""
MORE_SAMPLES, MORE_S = 250, 0.03
"""Of data that does not lie in memory so many further samples are compared, for so long (s)."""
MOST_BYTES = 2**28
"""Tensors up to this size are looked at whole; of longer ones PLACES numbers, evenly spaced."""
PLACES = 2**15
_ROW = 1024
"""Numbers of 64 bits that are summed up with random weights before they are hashed: six times as fast."""
SEEDED = (
    "draw what is random from the global generator of torch, numpy or random, which start from training.seed, or let "
    "the function take a parameter seed"
)


def digest(tensor: Tensor) -> str:
    """A hash of type, shape and numbers of a tensor, equal where they are; the longest are looked at in places."""
    tensor = tensor.detach()
    hashed = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=8)
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        return hashed.hexdigest()
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
    most = MOST_BYTES // flat.element_size() if flat.device.type == "cpu" else PLACES
    if flat.numel() > most:
        flat = flat[:: -(-flat.numel() // PLACES)]
    numbers = flat.contiguous().cpu().view(torch.uint8).numpy()
    rows = len(numbers) // (8 * _ROW)
    if rows:
        hashed.update((numbers[: rows * 8 * _ROW].view(np.int64).reshape(rows, _ROW) @ _weights()).tobytes())
    hashed.update(numbers[rows * 8 * _ROW :].tobytes())
    return hashed.hexdigest()


@cache
def _weights() -> np.ndarray[Any, Any]:
    """Odd numbers, the same in every process: the sum changes with any number of a row and with any place of it."""
    return np.random.default_rng(20261127).integers(-(2**62), 2**62, _ROW) | 1


@dataclass(frozen=True)
class Fingerprint:
    """What one rank has built: hashes by the words for what they are of."""

    parts: dict[str, str]
    more: dict[str, str] = field(default_factory=dict, compare=False)
    """Further samples, as many as there was time for: compared between ranks, but no part of `total`."""

    @classmethod
    def of(cls, task: Task, seed: int) -> Fingerprint:
        """Look at weights, buffers, lengths and samples; the generators start from `seed` for each sample."""
        return cls(dict(_parts(task, seed)), dict(_further(task, seed)))

    @property
    def total(self) -> str:
        """One hash of everything."""
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
        for index in compared(data):
            if time.perf_counter() > deadline:
                break
            yield f"sample {index} of {what}", _sample(data, index, what, seed)
        yield from whole_parts(data, what)


def whole_parts(data: Data, what: str) -> Iterator[tuple[str, str]]:
    """Hashes of everything that data in memory holds; of nothing for other data."""
    for name, tensor in whole(data):
        yield f"the whole of {name} of {what}", digest(tensor)


def whole(data: Data) -> list[tuple[str, Tensor]]:
    """The tensors that the samples come from, by name, where they lie in memory; [] where that is not known.

    Another's data set may hold anything beside its samples, such as scratch memory: only kinds that are known.
    """
    if isinstance(data, Cast):
        return whole(data.data)
    if isinstance(data, TensorData):
        return list(data.tensors.items())
    if isinstance(data, PairData):
        return _of_dataset(data.dataset)
    if type(data).__module__.startswith("labkit."):
        return [(place.removesuffix(" of ") or "data", tensor) for place, tensor in tensors_held(data, "")]
    return []


def _of_dataset(dataset: Any) -> list[tuple[str, Tensor]]:
    indices: list[tuple[str, Tensor]] = []
    while type(dataset) is Subset:
        indices.append(("the indices", torch.as_tensor(dataset.indices)))
        dataset = dataset.dataset
    if type(dataset) is not TensorDataset:
        return []
    return [*indices, *((f"tensor {number}", tensor) for number, tensor in enumerate(dataset.tensors))]


def _further(task: Task, seed: int) -> Iterator[tuple[str, str]]:
    """More samples of data that does not lie in memory, spread over its length however soon the time is over."""
    for what, data in (("train", task.train), ("test", task.test)):
        deadline = time.perf_counter() + MORE_S
        for index in () if whole(data) else evenly_spaced(len(data)):
            if time.perf_counter() > deadline:
                break
            yield f"sample {index} of {what}", _sample(data, index, what, seed)


def evenly_spaced(length: int) -> list[int]:
    """Indices below `length`, in an order in which any first few of them lie far apart (the golden ratio's)."""
    step = (5**0.5 - 1) / 2
    return list(dict.fromkeys(int((number * step) % 1 * length) for number in range(1, min(length, MORE_SAMPLES) + 1)))


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
    dist.all_gather_object(total, (mine.total, mine.more))
    if len({hashed for hashed, _ in total}) == 1 and all(_agree(more, total[0][1]) for _, more in total):
        return []
    first_time, second_time = ({**each.more, **each.parts} for each in (mine, again()))
    unsteady = {name for name, value in first_time.items() if second_time.get(name, value) != value}
    every: list[Any] = [None] * len(total)
    dist.all_gather_object(every, (first_time, unsteady))
    drawn = {name for _, names in every for name in names if " of train" in name}
    first = every[0][0]
    for rank, (parts, _) in enumerate(every):
        names = [name for name in (*first, *(set(parts) - set(first))) if name not in drawn]
        names = [name for name in names if not _cut_short(name, parts, first)]
        differing = [name for name in names if parts.get(name) != first.get(name)]
        if differing:
            raise TaskFault(_sentence(differing, first, parts, rank))
    return ["samples of train come from a generator without a seed: this run cannot be repeated"] if drawn else []


def _agree(mine: dict[str, str], theirs: dict[str, str]) -> bool:
    """Are the samples that both have looked at the same?"""
    return all(mine[name] == theirs[name] for name in mine.keys() & theirs.keys())


def _cut_short(name: str, *both: dict[str, str]) -> bool:
    """Is it a sample that one of them had no time to look at?"""
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
