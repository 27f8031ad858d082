"""Gradients of replicas summed in memory that the ranks of one machine share, as NCCL and MPI do between processes.

gloo sends through the loopback network whatever could be read directly: its threads take the cores from the ranks, and
a vision step on two cores takes a third longer for it (tests/benchmarks/exchange.py). Here each rank puts its gradients
into its own slot, adds up one N-th of all slots, and reads the rest of the sum: a reduce-scatter and an all-gather
without a copy through the kernel. Everyone adds in the order of the ranks, so all hold the same bits.

Ranks meet twice in an exchange, through named pipes: a rank that waits sleeps, and one that has ended closes its pipes,
so its peers know at once. Nothing of this outlives the ranks: the memory has no name, the pipes lose theirs once open.
"""

from __future__ import annotations

import mmap
import os
import select
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from labkit.experiment import Experiment


def offered(experiment: Experiment) -> bool:
    """Do the replicas of this experiment exchange gradients through shared memory?"""
    launch = experiment.launch
    wanted = launch.transport != "network" and launch.network is None and launch.device == "cpu"
    return wanted and experiment.layout.dp_replicate > 1 and not launch.isolated and hasattr(os, "memfd_create")


class SharedMemory:
    """Sums over all ranks of the run. Making it is collective; `folder` is private to the run and local.

    `capacity`: the largest exchange in bytes. `timeout_s`: how long to wait for a rank.
    """

    def __init__(self, folder: Path, capacity: int, timeout_s: float) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.timeout_s = timeout_s
        self.seconds = 0.0
        """Spent in exchanges so far."""
        self.updates = 0
        """Updates whose gradients went through here."""
        self._incoming, self._outgoing = self._connect(folder)
        self._slot = -(-capacity // mmap.PAGESIZE) * mmap.PAGESIZE
        # A slot for each rank, then one for the sum. Pages that nobody touches take no memory.
        self._memory = torch.frombuffer(self._map(folder, self._slot * (self.ranks + 1)), dtype=torch.uint8)

    def _connect(self, folder: Path) -> tuple[dict[int, int], list[int]]:
        """Pipes from and to every other rank."""
        others = [rank for rank in range(self.ranks) if rank != self.rank]
        mine = {rank: folder / f"{rank}-to-{self.rank}" for rank in others}
        for path in mine.values():
            os.mkfifo(path, 0o600)
        incoming = {rank: os.open(path, os.O_RDONLY | os.O_NONBLOCK) for rank, path in mine.items()}
        dist.barrier()
        outgoing = [os.open(folder / f"{self.rank}-to-{rank}", os.O_WRONLY) for rank in others]
        dist.barrier()
        for path in mine.values():
            path.unlink()
        return incoming, outgoing

    def _map(self, folder: Path, size: int) -> mmap.mmap:
        """The same memory in all ranks."""
        path = folder / "memory"
        if self.rank == 0:
            descriptor = os.memfd_create("labkit-gradients", os.MFD_CLOEXEC)
            os.truncate(descriptor, size)
            path.symlink_to(f"/proc/{os.getpid()}/fd/{descriptor}")
        dist.barrier()
        if self.rank:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        memory = mmap.mmap(descriptor, size)
        dist.barrier()
        os.close(descriptor)
        if self.rank == 0:
            path.unlink()
        return memory

    def all_reduce(self, flat: Tensor) -> None:
        """Replace a contiguous tensor on the CPU by its sum over all ranks."""
        begun = time.perf_counter()
        slots = [self._part(number, flat) for number in range(self.ranks + 1)]
        total = slots[self.ranks]
        slots[self.rank].copy_(flat)
        self._meet()
        # Nobody writes into a slot again before all have passed the second meeting, nor into the sum before the first
        # one of the next exchange, when all have read it.
        mine = [slot.tensor_split(self.ranks)[self.rank] for slot in slots]
        torch.add(mine[0], mine[1], out=mine[self.ranks])
        for part in mine[2 : self.ranks]:
            mine[self.ranks].add_(part)
        self._meet()
        flat.copy_(total)
        self.seconds += time.perf_counter() - begun

    def _part(self, number: int, like: Tensor) -> Tensor:
        begin = number * self._slot
        return self._memory[begin : begin + like.numel() * like.element_size()].view(like.dtype)

    def _meet(self) -> None:
        """Wait for all ranks; RuntimeError if one has ended or does not come."""
        deadline = time.monotonic() + self.timeout_s
        try:
            for pipe in self._outgoing:
                os.write(pipe, b"+")
        except BrokenPipeError:
            raise RuntimeError("connection closed by peer: a rank has ended") from None
        for rank, pipe in self._incoming.items():
            while (said := self._read(pipe)) is None:
                poll = select.poll()
                poll.register(pipe, select.POLLIN)
                if not poll.poll(1000 * max(0.0, deadline - time.monotonic())):
                    raise RuntimeError(f"rank {rank} did not come to the exchange within {self.timeout_s:g} s")
            if not said:
                raise RuntimeError(f"connection closed by peer: rank {rank} has ended")

    @staticmethod
    def _read(pipe: int) -> bytes | None:
        """One byte, nothing if the other end is closed, None if there is nothing to read yet."""
        try:
            return os.read(pipe, 1)
        except BlockingIOError:
            return None

    # -- as DDP's communication hook ----------------------------------------------------------------------------------

    @classmethod
    def attach(cls, replicated: Any, folder: Path, timeout_s: float) -> SharedMemory:
        """Let DDP average its buckets here instead of in its process group (collective)."""
        trained = [parameter for parameter in replicated.parameters() if parameter.requires_grad]
        memory = cls(folder, sum(parameter.numel() * parameter.element_size() for parameter in trained), timeout_s)
        # Not typed: DDP compares annotations with classes, and they are strings here.
        replicated.register_comm_hook(memory, lambda memory, bucket: memory.average(bucket))
        return memory

    def average(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """What DDP calls for every bucket (`torch.distributed.GradBucket`) that is complete."""
        flat: Tensor = bucket.buffer()
        self.all_reduce(flat)
        self.updates += bucket.is_last()
        done = torch.futures.Future[Tensor]()
        done.set_result(flat.div_(self.ranks))
        return done
