"""Gradients of replicas averaged in memory that the ranks of one machine share, as NCCL and MPI do between processes.

gloo sends through the loopback network what could be read directly: its threads take the cores from the ranks, which
makes a vision step on two cores take a third longer (tests/benchmarks/exchange.py). Here each rank writes its
gradients, divided by N, into its own slot, and the ranks add up the slots in the order of the ranks, so that all get
the same bits: each rank everything if they are few, otherwise one N-th each, and then they read the sums of the other
ranks (reduce-scatter and all-gather).

Ranks synchronise through named pipes: a rank that has to wait long sleeps, and one that has ended closes its pipes, so
its peers know at once. Nothing of this outlives the ranks: the memory has no name, and the pipes lose theirs once open.
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
"""Seconds for which a waiting rank polls before it sleeps: waking up takes longer than most waits."""


MAX_DIRECT_RANKS = 3
"""Largest number of ranks for which reading all slots moves less data than adding up in parts."""


def uses_shared_memory(experiment: Experiment) -> bool:
    """Return whether the replicas of this experiment reduce gradients in shared memory."""
    launch, gradients = experiment.launch, experiment.gradients
    plain = gradients.compression.key == "none" and not gradients.hierarchical
    requested = plain and launch.transport != "network" and launch.network is None and launch.device == "cpu"
    return requested and experiment.layout.dp_replicate > 1 and not launch.isolated and hasattr(os, "memfd_create")


class SharedMemory:
    """All-reduces tensors over all ranks of the run in shared memory. The constructor is collective.

    `folder`: a local folder that is private to the run. `capacity`: the largest tensor in bytes. `timeout_s`: how long
    to wait for a rank.
    """

    def __init__(self, folder: Path, capacity: int, timeout_s: float) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.timeout_s = timeout_s
        self.seconds = 0.0
        """Time spent in all-reduces so far."""
        self.spin_wait_seconds = 0.0
        """CPU time that this thread has spent polling for other ranks."""
        self.updates = 0
        """Number of updates whose gradients were reduced here."""
        self._incoming, self._outgoing = self._connect(folder)
        self._slot_bytes = -(-capacity // mmap.PAGESIZE) * mmap.PAGESIZE
        # Pages that no rank touches take no memory.
        self._memory = torch.frombuffer(self._map(folder, 2 * self.ranks * self._slot_bytes), dtype=torch.uint8)
        self._turn = 0

    def _connect(self, folder: Path) -> tuple[dict[int, int], list[int]]:
        """Open the pipes from every other rank, by rank, and those to every other rank (collective)."""
        peers = [rank for rank in range(self.ranks) if rank != self.rank]
        paths = {rank: folder / f"{rank}-to-{self.rank}" for rank in peers}
        for path in paths.values():
            os.mkfifo(path, 0o600)
        incoming = {rank: os.open(path, os.O_RDONLY | os.O_NONBLOCK) for rank, path in paths.items()}
        dist.barrier()
        outgoing = [os.open(folder / f"{self.rank}-to-{rank}", os.O_WRONLY) for rank in peers]
        dist.barrier()
        for path in paths.values():
            path.unlink()
        # Data loader processes of a rank must not keep its pipes open when it has ended.
        os.register_at_fork(after_in_child=partial(_close, [*incoming.values(), *outgoing]))
        return incoming, outgoing

    def _map(self, folder: Path, size: int) -> mmap.mmap:
        """Map `size` bytes of the same memory in all ranks (collective)."""
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
        (self._add_all if self.ranks <= MAX_DIRECT_RANKS else self._add_parts)(flat)
        self.seconds += time.perf_counter() - begun

    def _add_all(self, flat: Tensor) -> None:
        """Let every rank add up all slots: N times the gradients to read, one barrier.

        Two sets of slots take turns: before a rank writes to a slot again, a barrier has followed all reads of it.
        """
        self._turn = 1 - self._turn
        slots = [self._slot(self._turn * self.ranks + rank, flat) for rank in range(self.ranks)]
        torch.div(flat, self.ranks, out=slots[self.rank])
        self._barrier()
        _add(slots, flat)

    def _add_parts(self, flat: Tensor) -> None:
        """Let every rank add up one N-th and read the rest: three times the gradients to move, two barriers.

        No rank writes to a slot again before all have passed the second barrier, nor to the sum before the first
        barrier of the next all-reduce, when all have read it.
        """
        slots = [self._slot(number, flat) for number in range(self.ranks + 1)]
        torch.div(flat, self.ranks, out=slots[self.rank])
        self._barrier()
        *parts, total = (slot.tensor_split(self.ranks)[self.rank] for slot in slots)
        _add(parts, total)
        self._barrier()
        flat.copy_(slots[self.ranks])

    def _slot(self, number: int, like: Tensor) -> Tensor:
        begin = number * self._slot_bytes
        return self._memory[begin : begin + like.numel() * like.element_size()].view(like.dtype)

    def _barrier(self) -> None:
        """Wait for all ranks; RuntimeError if one has ended or does not arrive within `timeout_s`."""
        deadline = time.monotonic() + self.timeout_s
        try:
            for pipe in self._outgoing:
                os.write(pipe, b"+")
        except BrokenPipeError:
            raise RuntimeError("connection closed by peer: a rank has ended") from None
        for rank, pipe in self._incoming.items():
            message, begun = self._read(pipe), time.monotonic()
            cpu_begun = time.thread_time()  # CPU time: if cores are scarce, another process runs most of the time
            while message is None and time.monotonic() < begun + SPIN_S:
                os.sched_yield()
                message = self._read(pipe)
            self.spin_wait_seconds += time.thread_time() - cpu_begun
            while message is None:
                poll = select.poll()
                poll.register(pipe, select.POLLIN)
                if not poll.poll(1000 * max(0.0, deadline - time.monotonic())):
                    raise RuntimeError(f"rank {rank} did not come to the exchange within {self.timeout_s:g} s")
                message = self._read(pipe)
            if not message:
                raise RuntimeError(f"connection closed by peer: rank {rank} has ended")

    @staticmethod
    def _read(pipe: int) -> bytes | None:
        """Read one byte: empty if the other end is closed, None if there is nothing to read yet."""
        try:
            return os.read(pipe, 1)
        except BlockingIOError:
            return None

    # -- as DDP's comm hook -------------------------------------------------------------------------------------------

    @classmethod
    def attach(cls, replicated: Any, folder: Path, timeout_s: float) -> SharedMemory:
        """Make DDP average its buckets in shared memory instead of in its process group (collective)."""
        trained = [parameter for parameter in replicated.parameters() if parameter.requires_grad]
        memory = cls(folder, sum(parameter.numel() * parameter.element_size() for parameter in trained), timeout_s)
        # Not typed: DDP compares annotations with classes, and they are strings here.
        replicated.register_comm_hook(memory, lambda memory, bucket: memory.average_bucket(bucket))
        return memory

    def average_bucket(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """Average a bucket (`torch.distributed.GradBucket`) in place; DDP calls this for every complete bucket."""
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
