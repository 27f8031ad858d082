"""Messages between neighbouring stages of an asynchronous pipeline: sent and received while the rank computes.

A link carries tensors of one shape in one direction, in order. What it carries is said ahead of the first one, so that
nobody has to know it before. The two directions need process groups of their own: on a GPU, operations with one peer in
one group follow each other, and a stage that sends forward while its neighbour sends backward would wait for ever.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from labkit.parallel.pipeline import HEAD, empty, head


class Outbox:
    """To the rank at `place` of the group."""

    def __init__(self, group: dist.ProcessGroup, place: int) -> None:
        self._group, self._place = group, place
        self._described = False

    def send(self, x: Tensor) -> Sent:
        """Begin to send; keep what is returned until it has arrived."""
        x = x.contiguous()
        if not self._described:
            dist.send(head(x), group=self._group, group_dst=self._place)
            self._described = True
        return Sent(x, dist.isend(x, group=self._group, group_dst=self._place))


class Sent:
    """A message under way. Its memory must stay as it is until `wait()` is over."""

    def __init__(self, x: Tensor, work: dist.Work | None) -> None:
        self._x, self._work = x, work

    def wait(self) -> None:
        """Until it has left (on a GPU: the stream waits)."""
        if self._work is not None:
            self._work.wait()
            self._work = None


class Inbox:
    """From the rank at `place` of the group."""

    def __init__(self, group: dist.ProcessGroup, place: int, device: torch.device) -> None:
        self._group, self._place, self._device = group, place, device
        self._like: Tensor | None = None
        self._coming: tuple[Tensor, dist.Work | None] | None = None

    def expect(self) -> None:
        """There will be a next message: begin to receive it."""
        if self._like is None:
            described = torch.zeros(HEAD, dtype=torch.int64, device=self._device)
            dist.recv(described, group=self._group, group_src=self._place)
            self._like = empty(described).to("meta")
        x = torch.empty_like(self._like, device=self._device)
        self._coming = x, dist.irecv(x, group=self._group, group_src=self._place)

    def take(self) -> Tensor:
        """The next message (on a GPU: the stream waits for it)."""
        if self._coming is None:
            self.expect()
        assert self._coming is not None
        x, work = self._coming
        self._coming = None
        if work is not None:
            work.wait()
        return x
