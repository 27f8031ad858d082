"""Faults of the kinds that the harness finds, planted in every rank before it begins: one function each."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist

from labkit.parallel.replicate import ReplicatedModel
from labkit.training import runtime
from labkit.training.runtime import Runtime
from labkit.training.trainer import Trainer
from tests.pretended.labels import CPU, LABELS


def nothing() -> None:
    """Plant nothing."""


def batches_that_stay_on_the_host() -> None:
    """Leave the batches where the loader made them."""
    runtime.place_tensor = lambda tensor, device, dtype: tensor  # type: ignore[assignment]


def card_of_6_mb() -> None:
    """Give the GPU 6 MB, and let an operation fail that would need more."""
    memory, put = 6_000_000, LABELS.put

    def allocate(tensor: torch.Tensor, device: str, place: str = "") -> None:
        put(tensor, device, place)
        if device == CPU or tensor.nbytes < 16_384:  # to count all memory after each small tensor would take minutes
            return
        by_place: Counter[str] = Counter()
        for label in LABELS.on_gpu():
            by_place[label.place] += label.n_bytes
        if by_place.total() > memory:
            raise torch.OutOfMemoryError(f"{by_place.total()} bytes on a GPU of {memory}: {by_place.most_common(3)}")

    LABELS.put = allocate  # type: ignore[method-assign]
    torch.cuda.mem_get_info = lambda *device: (memory - torch.cuda.memory_allocated(), memory)


def message_of_the_host() -> None:
    """Send a tensor of the host by NCCL."""
    add_up = Runtime.add_up

    def planted(self: Runtime, sums: dict[str, float]) -> dict[str, float]:
        dist.all_reduce(torch.zeros(3))
        return add_up(self, sums)

    Runtime.add_up = planted  # type: ignore[method-assign]


def memory_that_grows() -> None:
    """Keep a tensor of every step."""
    kept: list[torch.Tensor] = []
    _before_each_step(lambda trainer: kept.append(torch.zeros(4096, device=trainer.runtime.device)))


def collectives_in_another_order() -> None:
    """Send two collectives in one order on rank 0, and in the other one on the other ranks."""

    def planted(trainer: Any) -> None:
        x = torch.zeros(2, device=trainer.runtime.device)
        sends = [lambda: dist.broadcast(x, 0, async_op=True), lambda: dist.all_reduce(x, async_op=True)]
        for send in sends[:: -1 if trainer.runtime.rank else 1]:
            send()

    _before_each_step(planted)


def ring_that_is_not_batched() -> None:
    """Let two ranks send to each other before either receives."""

    def planted(trainer: Any) -> None:
        own, received = (torch.zeros(2, device=trainer.runtime.device) for _ in range(2))
        peer = 1 - trainer.runtime.rank
        for work in (dist.isend(own, peer), dist.irecv(received, peer)):
            assert work is not None
            work.wait()

    _before_each_step(planted)


def norm_that_is_read() -> None:
    """Read the norm of the gradient in every step."""
    clip = ReplicatedModel.clip

    def planted(self: ReplicatedModel, limit: float) -> torch.Tensor:
        norm = clip(self, limit)
        float(norm)
        return norm

    ReplicatedModel.clip = planted  # type: ignore[method-assign]


def _before_each_step(plant: Any) -> None:
    begin = Trainer._begin_step

    def planted(self: Trainer, *args: Any) -> None:
        plant(self)
        begin(self, *args)

    Trainer._begin_step = planted  # type: ignore[method-assign]
