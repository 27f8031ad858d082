"""Gradients of replicas averaged in memory that the ranks of one machine share, as NCCL and MPI do between processes.

gloo sends through the loopback network whatever could be read directly: its threads take the cores from the ranks, and
a vision step on two cores takes a third longer for it (tests/benchmarks/exchange.py). Here each rank puts its N-th of
the mean into its own slot, and all add up what they find, in the order of the ranks, so that all hold the same bits:
everything if they are few, else one N-th each and then the sums of the others (reduce-scatter and all-gather).

Ranks meet through named pipes: a rank that has to wait long sleeps, and one that has ended closes its pipes, so its
peers know at once. Nothing of this outlives the ranks: the memory has no name, the pipes lose theirs once open.
"""

from __future__ import annotations

import mmap
import os
import select
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from labkit.experiment import Experiment

SPIN_S = 0.002
"""A rank that has to wait asks again and again for so long before it sleeps: waking up takes longer than most waits."""


FEW = 3
"""Up to so many ranks, reading everything is less to move than adding up in parts."""


def offered(experiment: Experiment) -> bool:
    """Do the replicas of this experiment exchange gradients through shared memory?"""
    launch, gradients = experiment.launch, experiment.gradients
    plain = gradients.compression.key == "none" and not gradients.hierarchical
    wanted = plain and launch.transport != "network" and launch.network is None and launch.device == "cpu"
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
        self.spun = 0.0
        """Processor time of the thread that went into asking again and again for a rank that had not come yet."""
        self.updates = 0
        """Updates whose gradients went through here."""
        self._incoming, self._outgoing = self._connect(folder)
        self._slot_bytes = -(-capacity // mmap.PAGESIZE) * mmap.PAGESIZE
        # Pages that nobody touches take no memory.
        self._memory = torch.frombuffer(self._map(folder, 2 * self.ranks * self._slot_bytes), dtype=torch.uint8)
        self._turn = 0

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
        # Loader processes of a rank must not hold its pipes open when it is gone.
        os.register_at_fork(after_in_child=partial(_close, [*incoming.values(), *outgoing]))
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
        """Replace a contiguous tensor on the CPU by its mean over all ranks."""
        begun = time.perf_counter()
        (self._add_all if self.ranks <= FEW else self._add_parts)(flat)
        self.seconds += time.perf_counter() - begun

    def _add_all(self, flat: Tensor) -> None:
        """Everyone adds everything up: N times the gradients to read, one meeting.

        Two sets of slots take turns: whoever writes into one again has met all others since they read it.
        """
        self._turn = 1 - self._turn
        slots = [self._slot(self._turn * self.ranks + rank, flat) for rank in range(self.ranks)]
        torch.div(flat, self.ranks, out=slots[self.rank])
        self._meet()
        _add(slots, flat)

    def _add_parts(self, flat: Tensor) -> None:
        """Everyone adds up one N-th, then reads the rest: three times the gradients to move, two meetings.

        Nobody writes into a slot again before all have passed the second meeting, nor into the sum before the first one
        of the next exchange, when all have read it.
        """
        slots = [self._slot(number, flat) for number in range(self.ranks + 1)]
        torch.div(flat, self.ranks, out=slots[self.rank])
        self._meet()
        *mine, total = (slot.tensor_split(self.ranks)[self.rank] for slot in slots)
        _add(mine, total)
        self._meet()
        flat.copy_(slots[self.ranks])

    def _slot(self, number: int, like: Tensor) -> Tensor:
        begin = number * self._slot_bytes
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
            said, begun = self._read(pipe), time.monotonic()
            ran = time.thread_time()  # where cores are short, another process runs in most of the time
            while said is None and time.monotonic() < begun + SPIN_S:
                os.sched_yield()
                said = self._read(pipe)
            self.spun += time.thread_time() - ran
            while said is None:
                poll = select.poll()
                poll.register(pipe, select.POLLIN)
                if not poll.poll(1000 * max(0.0, deadline - time.monotonic())):
                    raise RuntimeError(f"rank {rank} did not come to the exchange within {self.timeout_s:g} s")
                said = self._read(pipe)
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
        done.set_result(flat)
        return done


def _add(parts: list[Tensor], out: Tensor) -> None:
    torch.add(parts[0], parts[1], out=out)
    for part in parts[2:]:
        out.add_(part)


def _close(pipes: list[int]) -> None:
    for pipe in pipes:
        os.close(pipe)
