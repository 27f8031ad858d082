"""Hierarchical reduction: within a host first, where the link is fast, then between hosts, then back.

With N = hosts · L ranks, the L ranks of one host reduce-scatter their gradients (by an all-to-all), so that each has
the mean of one shard (one L-th). Ranks with the same local rank average their shards between hosts, and nothing else
crosses the slow link: one L-th of the gradients per rank, compressed. Finally the shards are gathered within the host.
(Goyal et al., arXiv:1706.02677, section 4; the 2-level all-reduce of NCCL and Horovod.)

Bytes that one rank sends for n bytes: 2 · (L-1)/L · n within the host, and what the compressor sends between hosts for
n/L.

Rank r is on host r // L. A shard may begin and end within a parameter.
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
    """Reduces by `method` between hosts and without compression within them.

    Creating it is collective: all ranks of the run must take part.
    """

    def __init__(
        self, method: type[Compressor], options: Any, hosts: int, steps: int, seed: int, clock: Clock | None = None
    ) -> None:
        world, rank = dist.get_world_size(), dist.get_rank()
        local = world // hosts
        inside = [list(range(host * local, (host + 1) * local)) for host in range(hosts)]
        between = [list(range(local_rank, world, local)) for local_rank in range(local)]
        self._inside = Communicator(_own_group(inside, rank), clock)
        self._method = method(options, Communicator(_own_group(between, rank), clock), steps, seed)
        self._method.averages_momentum = False  # momentum is kept by parameter, and a shard may end within one
        super().__init__(options, self._method.comm, steps, seed)
        self.name = method.name  # type: ignore[misc]

    @property
    def comms(self) -> tuple[Communicator, ...]:
        """The communicator within the host and the one between hosts."""
        return (self._inside, self.comm)

    @property
    def world_size(self) -> int:
        """World size over both levels of the hierarchy."""
        return self._inside.size * self.comm.size

    def optimizer(self, settings: Optimizer) -> Callable[[Any], torch.optim.Optimizer] | None:
        """Return the factory of the wrapped compressor's own optimizer; None if it has none."""
        return self._method.optimizer(settings)

    def attach_optimizer(self, optimizer: torch.optim.Optimizer, settings: Optimizer) -> None:
        """Forward the optimizer to the wrapped compressor."""
        self._method.attach_optimizer(optimizer, settings)

    def scale(self, bucket: GradientBucket, parameter: Any) -> torch.Tensor | None:
        """Return the scale of the wrapped compressor."""
        return self._method.scale(bucket, parameter)

    def state(self) -> dict[str, torch.Tensor]:
        """Return the local state of the wrapped compressor."""
        return self._method.state()

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Restore the local state of the wrapped compressor."""
        self._method.load(state)

    def reduce(self, bucket: GradientBucket) -> InFlight:
        """Average a bucket over all ranks of the run."""
        flat, local = bucket.flat, self._inside.size
        shards = flat.new_zeros(local, -(-flat.numel() // local))
        shards.view(-1)[: flat.numel()] = flat
        exchanged = self._inside.all_to_all(shards)
        yield
        shard = exchanged.wait().mean(0)
        between_hosts = self._method.reduce(self._shard_bucket(bucket, shard))
        mean = yield from between_hosts
        gathered = self._inside.all_gather(mean)
        yield
        return gathered.wait().view(-1)[: flat.numel()]

    def _shard_bucket(self, bucket: GradientBucket, shard: Any) -> GradientBucket:
        key = tuple(map(id, bucket.parameters))
        return GradientBucket(shard, (key,), (tuple(shard.shape),), bucket.step, bucket.index)

    def expected_bytes(self, bucket: GradientBucket) -> int:
        """Return the bytes that this rank sends for a bucket on both levels, by the formula."""
        size, local = bucket.flat.element_size(), self._inside.size
        shard = -(-bucket.flat.numel() // local)
        between_hosts = CostContext(self.comm.size, bucket.step, self.steps, size)
        return (
            all_to_all_bytes(local * shard * size, local)
            + self._method.bucket_bytes(self.options, [(shard,)], between_hosts)
            + all_gather_bytes(shard * size, local)
        )


def _own_group(members: list[list[int]], rank: int) -> Any:
    """Create a process group for each list of ranks, and return the one that `rank` is in (collective)."""
    groups = [dist.new_group(ranks) for ranks in members]
    return next(group for group, ranks in zip(groups, members, strict=True) if rank in ranks)
