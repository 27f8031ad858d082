"""Messages between neighbouring stages of an asynchronous pipeline, sent and received while the rank computes.

A link carries tensors of one shape in one direction, in order. A header goes ahead of the first one, so that the
receiver need not know the shape beforehand. The two directions need process groups of their own: on a GPU, operations
with one peer in one group follow each other, and a stage that sends forward while its neighbour sends backward would
wait for ever.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from labkit.parallel.pipeline import HEADER_SIZE, empty_from_header, make_header


class Outbox:
    """Sends tensors to the rank at index `peer` of the group."""

    def __init__(self, group: dist.ProcessGroup, peer: int) -> None:
        self._group, self._peer = group, peer
        self._header_sent = False

    def send(self, x: Tensor) -> Sent:
        """Start to send `x`; the caller keeps the returned handle until the message has arrived."""
        x = x.contiguous()
        if not self._header_sent:
            dist.send(make_header(x), group=self._group, group_dst=self._peer)
            self._header_sent = True
        return Sent(x, dist.isend(x, group=self._group, group_dst=self._peer))


class Sent:
    """A message that is being sent. Its memory must not change before `wait()` has returned."""

    def __init__(self, x: Tensor, work: dist.Work | None) -> None:
        self._x, self._work = x, work

    def wait(self) -> None:
        """Wait until the message has left (on a GPU: the stream waits)."""
        if self._work is not None:
            self._work.wait()
            self._work = None


class Inbox:
    """Receives tensors from the rank at index `peer` of the group."""

    def __init__(self, group: dist.ProcessGroup, peer: int, device: torch.device) -> None:
        self._group, self._peer, self._device = group, peer, device
        self._like: Tensor | None = None
        self._pending: tuple[Tensor, dist.Work | None] | None = None

    def start_receive(self) -> None:
        """Start to receive the next message; to be called only if there will be one."""
        if self._like is None:
            header = torch.zeros(HEADER_SIZE, dtype=torch.int64, device=self._device)
            dist.recv(header, group=self._group, group_src=self._peer)
            self._like = empty_from_header(header).to("meta")
        x = torch.empty_like(self._like, device=self._device)
        self._pending = x, dist.irecv(x, group=self._group, group_src=self._peer)

    def receive(self) -> Tensor:
        """Return the next message when it is complete (on a GPU: the stream waits for it)."""
        if self._pending is None:
            self.start_receive()
        assert self._pending is not None
        x, work = self._pending
        self._pending = None
        if work is not None:
            work.wait()
        return x
