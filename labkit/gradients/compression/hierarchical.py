"""Aggregation in two storeys: within a host first, where the link is fast, then between hosts, then back.

Of N = hosts · L ranks, the L of one host deal their gradients out (all-to-all) and add up one L-th each; ranks that
stand at the same place in their hosts average these parts, which is all that crosses the slow link: one L-th of the
gradients a rank, made smaller by the compressor; at last the parts are gathered within the host. (Goyal et al.,
arXiv:1706.02677, section 4; the 2-level all-reduce of NCCL and Horovod.)

Bytes of one rank for n bytes: 2 · (L-1)/L · n within the host, and what the compressor needs among the hosts for n/L.

Rank r stands in host r // L. The part of a rank crosses the borders of parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from labkit.experiment import Optimizer
from labkit.gradients.compression.compressor import Compressor, CostContext, GradientBucket, InFlight
from labkit.gradients.cost import all_gather_bytes, all_to_all_bytes
from labkit.gradients.stopwatch import Clock
from labkit.gradients.wire import Communicator


class Hierarchical(Compressor):
    """`method` between hosts, plain sums within them. Making it is collective: all ranks of the run take part."""

    def __init__(
        self, method: type[Compressor], options: Any, hosts: int, steps: int, seed: int, clock: Clock | None = None
    ) -> None:
        world, rank = dist.get_world_size(), dist.get_rank()
        local = world // hosts
        inside = [list(range(host * local, (host + 1) * local)) for host in range(hosts)]
        between = [list(range(place, world, local)) for place in range(local)]
        self._inside = Communicator(_own_group(inside, rank), clock)
        self._method = method(options, Communicator(_own_group(between, rank), clock), steps, seed)
        self._method.averages_momentum = False  # it is known by parameter, and a part crosses their borders
        super().__init__(options, self._method.comm, steps, seed)
        self.name = method.name  # type: ignore[misc]

    @property
    def comms(self) -> tuple[Communicator, ...]:
        """That within the host and that between hosts."""
        return (self._inside, self.comm)

    @property
    def world_size(self) -> int:
        """All of them."""
        return self._inside.size * self.comm.size

    def optimizer(self, settings: Optimizer) -> Callable[[Any], torch.optim.Optimizer] | None:
        """That of the method."""
        return self._method.optimizer(settings)

    def attach_optimizer(self, optimizer: torch.optim.Optimizer, settings: Optimizer) -> None:
        """Tell the method."""
        self._method.attach_optimizer(optimizer, settings)

    def scale(self, bucket: GradientBucket, parameter: Any) -> torch.Tensor | None:
        """That of the method."""
        return self._method.scale(bucket, parameter)

    def state(self) -> dict[str, torch.Tensor]:
        """That of the method."""
        return self._method.state()

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """To the method."""
        self._method.load(state)

    def reduce(self, bucket: GradientBucket) -> InFlight:
        """The mean over all ranks."""
        flat, local = bucket.flat, self._inside.size
        parts = flat.new_zeros(local, -(-flat.numel() // local))
        parts.view(-1)[: flat.numel()] = flat
        dealt = self._inside.all_to_all(parts)
        yield
        part = dealt.wait().mean(0)
        among_hosts = self._method.reduce(self._part(bucket, part))
        mean = yield from among_hosts
        gathered = self._inside.all_gather(mean)
        yield
        return gathered.wait().view(-1)[: flat.numel()]

    def _part(self, bucket: GradientBucket, part: Any) -> GradientBucket:
        key = tuple(map(id, bucket.parameters))
        return GradientBucket(part, (key,), (tuple(part.shape),), bucket.step, bucket.number)

    def expected_bytes(self, bucket: GradientBucket) -> int:
        """What this rank sends for this bundle, by the formula."""
        size, local = bucket.flat.element_size(), self._inside.size
        part = -(-bucket.flat.numel() // local)
        among_hosts = CostContext(self.comm.size, bucket.step, self.steps, size)
        return (
            all_to_all_bytes(local * part * size, local)
            + self._method.bucket_bytes(self.options, [(part,)], among_hosts)
            + all_gather_bytes(part * size, local)
        )


def _own_group(families: list[list[int]], rank: int) -> Any:
    """The group of the family that `rank` is in. All ranks make all groups, in one order."""
    groups = [dist.new_group(family) for family in families]
    return next(group for group, family in zip(groups, families, strict=True) if rank in family)
