"""Communication within a process group that counts the bytes this rank sends.

Everything that the methods of this package send goes through a `Communicator`; `cost.py` has the cost of each
collective. A point-to-point send costs the bytes sent, a receive costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from labkit.gradients.cost import all_gather_bytes, all_reduce_bytes, all_to_all_bytes
from labkit.gradients.stopwatch import Clock, Stopwatch


class PendingWork:
    """Handle of an operation that has been started; `wait()` returns its result."""

    def __init__(self, comm: Communicator, work: Any, result: Tensor) -> None:
        self._comm, self._work, self._result = comm, work, result

    def wait(self) -> Tensor:
        """Block until the result is complete (on a GPU: until the stream may use it) and return it."""
        if self._work is not None:
            begun = self._comm.stopwatch.now()
            self._work.wait()
            self._work = None
            self._comm.stopwatch.add(begun)
        return self._result

    def is_completed(self) -> bool:
        """Return whether the result is complete, so that `wait` would not block."""
        return self._work is None or bool(self._work.is_completed())


class Communicator:
    """Collectives and point-to-point transfers among the ranks of a process group (all ranks, if None).

    Operations start at once and in the order of the calls, which must be the same on all ranks. Tensors must be
    contiguous and must not change until the operation is complete. `clock` is that of the device that computes; None
    stands for the host's.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, clock: Clock | None = None) -> None:
        alone = group is None and not dist.is_initialized()
        self.group = group if group is not None or alone else dist.group.WORLD
        self.rank, self.size = (0, 1) if alone else (dist.get_rank(self.group), dist.get_world_size(self.group))
        self.sent_bytes = 0
        """Bytes that this rank has sent so far."""
        self.calls = 0
        """Operations that this rank has started so far."""
        self.stopwatch = Stopwatch(clock)

    @property
    def wait_seconds(self) -> float:
        """Seconds for which this rank has waited for operations so far."""
        return self.stopwatch.seconds

    def all_reduce(self, x: Tensor) -> PendingWork:
        """Start to replace `x`, in place, by its sum over all ranks."""
        self._count(all_reduce_bytes(_bytes(x), self.size))
        if self.size == 1:
            return PendingWork(self, None, x)
        return PendingWork(self, dist.all_reduce(x, group=self.group, async_op=True), x)

    def all_gather(self, x: Tensor) -> PendingWork:
        """Start to gather the tensors of all ranks, which have one shape; the result has shape [size, *x.shape]."""
        self._count(all_gather_bytes(_bytes(x), self.size))
        if self.size == 1:
            return PendingWork(self, None, x.clone()[None])
        out = x.new_empty((self.size, *x.shape))
        work = dist.all_gather_into_tensor(out.view(-1), x.view(-1), group=self.group, async_op=True)
        return PendingWork(self, work, out)

    def all_to_all(self, x: Tensor) -> PendingWork:
        """Start to send x[r] to every rank r; result[r] is what rank r sent here. Both have shape [size, …]."""
        self._count(all_to_all_bytes(_bytes(x), self.size))
        if self.size == 1:
            return PendingWork(self, None, x.clone())
        out = torch.empty_like(x)
        return PendingWork(self, dist.all_to_all_single(out, x, group=self.group, async_op=True), out)

    def send(self, x: Tensor, to: int, tag: int = 0) -> PendingWork:
        """Start to send `x` to rank `to` of the group."""
        self._count(_bytes(x))
        work = dist.isend(x, group=self.group, group_dst=to, tag=tag)
        return PendingWork(self, work, x)

    def receive(self, x: Tensor, source: int, tag: int = 0) -> PendingWork:
        """Start to receive `x`, in place, from rank `source` of the group."""
        self.calls += 1
        work = dist.irecv(x, group=self.group, group_src=source, tag=tag)
        return PendingWork(self, work, x)

    def send_and_receive(self, x: Tensor, peers: Sequence[int]) -> list[Tensor]:
        """Send `x` to each peer (a rank of the group) and return what each of them sent, in the order of `peers`.

        All transfers are posted as one batch: NCCL runs those between two ranks one after the other, so ranks that all
        sent first would wait for each other forever.
        """
        received = [torch.empty_like(x) for _ in peers]
        operations = [dist.P2POp(dist.isend, x, group=self.group, group_peer=peer) for peer in peers]
        operations += [
            dist.P2POp(dist.irecv, into, group=self.group, group_peer=peer)
            for into, peer in zip(received, peers, strict=True)
        ]
        for _ in peers:
            self._count(_bytes(x))
            self.calls += 1
        begun = self.stopwatch.now()
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        self.stopwatch.add(begun)
        return received

    def receive_from_any(self, x: Tensor, tag: int = 0) -> int:
        """Block until any rank has sent into `x`, and return that rank of the group.

        It is meant for threads that do nothing but wait, so the time is not counted.
        """
        self.calls += 1
        source = dist.recv(x, group=self.group, tag=tag)
        return dist.get_group_rank(self.group, source) if self.group is not None else source

    def broadcast(self, x: Tensor, source: int = 0) -> PendingWork:
        """Start to copy `x` of rank `source` to all ranks; `source` counts its bytes once for each of the others."""
        self._count((self.size - 1) * _bytes(x) if self.rank == source else 0)
        if self.size == 1:
            return PendingWork(self, None, x)
        return PendingWork(self, dist.broadcast(x, group=self.group, group_src=source, async_op=True), x)

    def _count(self, size: int) -> None:
        self.calls += 1
        self.sent_bytes += size


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
