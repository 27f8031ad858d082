"""Gradients of all ranks added up in buckets, and ZeRO stages 1 and 2 on top of it (Rajbhandari et al. 2020).

| stage | each rank keeps of the                     | exchange of gradients | after the update   |
|-------|--------------------------------------------|-----------------------|--------------------|
| 0     | everything                                 | all-reduce            |                    |
| 1     | 1/N of the optimizer state                 | reduce-scatter        | gather parameters  |
| 2     | … and 1/N of the gradients                 | reduce-scatter        | gather parameters  |

(Stage 3, 1/N of the parameters too, is torch's `fully_shard`: see shard.py.)

A bucket is a stretch of memory in which the gradients of some parameters lie one after the other, so that one message
takes them all; with ZeRO the parameters themselves lie in such a stretch, rank r owns its r-th part, and the optimizer
sees that part only. A bucket leaves as soon as the last of its gradients is there, while the backward pass goes on.

With a compressor (labkit.gradients) a bucket of stage 0 goes through its exchange instead; what ZeRO sums along
dp_shard stays as it is, and the compressor stands between the replicas of a part.

Where a parameter's gradient is summed over other axes too (dp_replicate, cp, tp with sequence parallelism), the own
part is summed over those afterwards. All of that is linear, so the order does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from labkit.experiment import Gradients
from labkit.gradients.compressor import replicas
from labkit.gradients.cost import all_gather_bytes, all_reduce_bytes, all_to_all_bytes
from labkit.gradients.exchange import Counters, Exchange, Exchanges
from labkit.gradients.stopwatch import Stopwatch
from labkit.parallel.cut import Holding
from labkit.parallel.decay import by_shape, decays
from labkit.parallel.mesh import REDUCED, Mesh

Named = list[tuple[str, nn.Parameter, Holding]]


def summed_axes(holding: Holding) -> tuple[str, ...]:
    """Axes over which the gradient of such a parameter is added up."""
    return tuple(axis for axis in REDUCED if axis not in holding.cuts) + tuple(sorted(holding.partial))


def share(holding: Holding, mesh: Mesh) -> float:
    """What one rank's squared norm of such a parameter adds to the global one, where others hold the same values."""
    return 0.0 if holding.copy else mesh.size("pp", *holding.cuts) / mesh.layout.world_size


class Bucket:
    """Parameters whose gradients travel together and are added up on every rank (stage 0)."""

    parts = 1
    """Into how many parts, on as many ranks, the sum is cut."""

    def __init__(self, named: Named, mesh: Mesh, watch: Stopwatch, exchanges: Exchanges | None = None) -> None:
        self.names = [name for name, _, _ in named]
        self.parameters = [parameter for _, parameter, _ in named]
        self.holding = named[0][2]
        self.length = sum(parameter.numel() for parameter in self.parameters)
        self.waiting = len(self.parameters)
        """Gradients that are not there yet."""
        self._mesh = mesh
        self._work: dist.Work | None = None
        self.sent = 0
        """Bytes that this rank has sent for it so far, by the formulas; without what a compressor counts."""
        self._watch = watch
        """Adds up how long exchanges were waited for."""
        self._make()
        group = self._replicas
        self._exchange: Exchange | None = exchanges.over(group, summed=True) if exchanges and group else None

    def _make(self) -> None:
        self._group = self._mesh.group(*summed_axes(self.holding))
        self._lay_out_gradients(self.length)

    @property
    def _replicas(self) -> dist.ProcessGroup | None:
        """The ranks among which a compressor may stand."""
        return self._group

    def _lay_out_gradients(self, length: int) -> None:
        self.gradient = self.parameters[0].detach().new_zeros(length)
        for view, parameter in zip(self._views(self.gradient), self.parameters, strict=True):
            parameter.grad = view

    def _views(self, flat: Tensor) -> list[Tensor]:
        pieces = flat[: self.length].split([parameter.numel() for parameter in self.parameters])
        return [piece.view(parameter.shape) for piece, parameter in zip(pieces, self.parameters, strict=True)]

    def send(self) -> None:
        """Start the exchange."""
        if self._exchange is not None:
            self._exchange.send(self.gradient, self.parameters, [parameter.shape for parameter in self.parameters])
        elif self._group is not None:
            self.sent += all_reduce_bytes(_bytes(self.gradient), self._group.size())
            self._work = dist.all_reduce(self.gradient, group=self._group, async_op=True)

    def arrive(self) -> None:
        """Wait for the exchange."""
        if self._work is not None:
            begun = self._watch.now()
            self._work.wait()
            self._work = None
            self._watch.add(begun)
        elif self._exchange is not None:
            self._exchange.arrive()
        self.waiting = len(self.parameters)

    def finish(self) -> None:
        """All passes have arrived."""

    @property
    def result(self) -> Tensor:
        """What this rank keeps of the gradient of the whole batch."""
        return self.gradient

    def optimized(self) -> list[tuple[nn.Parameter, bool]]:
        """What the optimizer works on, and whether it decays."""
        return by_shape(self.parameters)

    def clear(self) -> None:
        """Zero for the next update."""
        self.gradient.zero_()


class ShardedBucket(Bucket):
    """ZeRO stage 1: rank r adds up the r-th part only and keeps the optimizer's state for it."""

    def _make(self) -> None:
        mesh = self._mesh
        self._group = mesh.group("dp_shard")
        self._rest = mesh.group(*(axis for axis in summed_axes(self.holding) if axis != "dp_shard"))
        self.parts = mesh.size("dp_shard")
        self._size = math.ceil(self.length / self.parts)
        self.values = self.parameters[0].detach().new_zeros(self._size * self.parts)
        for view, parameter in zip(self._views(self.values), self.parameters, strict=True):
            view.copy_(parameter.detach())
            parameter.data = view
        self.own = nn.Parameter(self._own_part(self.values))
        self._lay_out_gradients(self._size * self.parts)
        self._sum = self._make_sum()

    @property
    def _replicas(self) -> dist.ProcessGroup | None:
        return self._rest

    def _make_sum(self) -> Tensor:
        """Where the sum over the ranks stands: in place of the own part of what was sent, so it takes no memory."""
        return self._own_part(self.gradient)

    def _own_part(self, flat: Tensor) -> Tensor:
        index = self._mesh.index("dp_shard")
        return flat[index * self._size : (index + 1) * self._size]

    def send(self) -> None:
        """Start the exchange."""
        self.sent += all_to_all_bytes(_bytes(self.values), self.parts)
        self._arrived = self.values.new_empty(self._size)
        self._work = dist.reduce_scatter_tensor(self._arrived, self.gradient, group=self._group, async_op=True)

    def arrive(self) -> None:
        """Wait for the exchange and keep what has come."""
        super().arrive()
        self._keep(self._arrived)
        del self._arrived

    def _keep(self, arrived: Tensor) -> None:
        self._sum.copy_(arrived)  # the one exchange of the update

    def finish(self) -> None:
        """Sum over the other axes too."""
        if self._exchange is not None:
            self._exchange.send(self._sum, [self.own], [self.own.shape])
            self._exchange.arrive()
        elif self._rest is not None:
            self.sent += all_reduce_bytes(_bytes(self._sum), self._rest.size())
            dist.all_reduce(self._sum, group=self._rest)
        self.own.grad = self._sum

    @property
    def result(self) -> Tensor:
        """The own part."""
        return self._sum

    def optimized(self) -> list[tuple[nn.Parameter, bool]]:
        """The own part."""
        return [(self.own, decays(self.parameters[0]))]

    def spread(self) -> dist.Work:
        """After the update: every rank gets the parts of all others. Wait for what it returns."""
        self.sent += all_gather_bytes(_bytes(self.own), self.parts)
        work: dist.Work = dist.all_gather_into_tensor(
            self.values, self.own.detach().clone(), group=self._group, async_op=True
        )
        return work

    def gathered(self, own: Tensor) -> dict[str, Tensor]:
        """Tensors shaped like the parameters, by name, from every rank's part (collective)."""
        flat = own.new_empty(len(self.values))
        dist.all_gather_into_tensor(flat, own.contiguous(), group=self._group)
        return dict(zip(self.names, self._views(flat), strict=True))

    def taken(self, whole: dict[str, Tensor], padding: float = 0.0) -> Tensor:
        """The own part of such tensors: the inverse of `gathered`."""
        kind = whole[self.names[0]].dtype  # moments may be finer than weights
        flat = torch.full_like(self.values, padding, dtype=kind)
        for name, view in zip(self.names, self._views(flat), strict=True):
            view.copy_(whole[name])
        return self._own_part(flat).clone()


class FreeingBucket(ShardedBucket):
    """ZeRO stage 2: gradients are collected when all are there, sent, and freed; between passes only sums stay."""

    def _lay_out_gradients(self, length: int) -> None:
        self.gradient = self.values.new_zeros(0)

    def _make_sum(self) -> Tensor:
        return torch.zeros_like(self.own.detach())

    def _keep(self, arrived: Tensor) -> None:
        self._sum += arrived  # one exchange a pass

    def send(self) -> None:
        """Collect, and start the exchange."""
        self.gradient = torch.zeros_like(self.values)
        for view, parameter in zip(self._views(self.gradient), self.parameters, strict=True):
            if parameter.grad is not None:
                view.copy_(parameter.grad)
                parameter.grad = None
        super().send()

    def arrive(self) -> None:
        """Wait for the exchange, add what has come and free what was sent."""
        super().arrive()
        self.gradient = self.values.new_zeros(0)

    def clear(self) -> None:
        """Zero for the next update."""
        self._sum.zero_()


BUCKETS: tuple[type[Bucket], ...] = (Bucket, ShardedBucket, FreeingBucket)
"""By stage."""


class GradientSync:
    """All buckets of one rank. `stage` 0 sums gradients; 1 and 2 are the stages of ZeRO along dp_shard."""

    averaged_over = 1
    """Gradients add up, nothing is averaged."""

    def __init__(self, named: Named, mesh: Mesh, stage: int, gradients: Gradients, exchanges: Exchanges) -> None:
        self._mesh, self._each_pass, self._overlap = mesh, stage == 2, gradients.overlap
        compresses = exchanges.wanted and replicas(mesh.layout) > 1
        self._exchanges = exchanges if compresses else None
        # On a GPU by events of the stream: the wait of NCCL returns to the host at once.
        self._watch = Stopwatch(exchanges.clock)
        self.buckets: list[Bucket] = []
        self._sends = self._hooks_send = False
        limit, kind_of_bucket = gradients.bucket_mb * 2**20, BUCKETS[stage]
        rows: dict[tuple[object, ...], Named] = {}
        # Gradients come in about the opposite order of the parameters.
        for name, parameter, holding in reversed(named):
            alike = (summed_axes(holding), tuple(sorted(holding.cuts)), holding.tied, holding.copy)
            kind = (*alike, decays(parameter), parameter.dtype)
            row = rows.setdefault(kind, [])
            row.append((name, parameter, holding))
            if sum(p.numel() * p.element_size() for _, p, _ in row) >= limit:
                self.buckets.append(kind_of_bucket(rows.pop(kind), mesh, self._watch, self._exchanges))
        self.buckets += [kind_of_bucket(row, mesh, self._watch, self._exchanges) for row in rows.values()]
        for bucket in self.buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(self._ready(bucket))

    @property
    def sharded(self) -> list[ShardedBucket]:
        """The buckets of ZeRO; none at stage 0."""
        return [bucket for bucket in self.buckets if isinstance(bucket, ShardedBucket)]

    def _ready(self, bucket: Bucket) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if self._hooks_send:
                bucket.waiting -= 1
                if bucket.waiting == 0:
                    bucket.send()

        return hook

    def begin_pass(self, last: bool, scheduled: bool) -> None:
        """Before a pass: gradients leave as they come, in the last one, with stage 2 in each one.

        Those of a pipeline's schedule come from several microbatches and leave when it is over.
        """
        self._sends = last or (self._each_pass and not scheduled)
        self._hooks_send = self._sends and self._overlap and not scheduled

    def end_pass(self, last: bool) -> None:
        """After a pass: what was sent arrives; after the `last` one the update's gradients are complete."""
        if not self._sends:
            return
        self._hooks_send = False
        for bucket in self.buckets:
            if bucket.waiting:
                bucket.send()
        for bucket in self.buckets:
            bucket.arrive()
        if last:
            for bucket in self.buckets:
                bucket.finish()
            if self._exchanges is not None:
                self._exchanges.end_update()

    def optimized(self) -> list[tuple[nn.Parameter, bool]]:
        """What the optimizer works on, and whether it decays."""
        return [pair for bucket in self.buckets for pair in bucket.optimized()]

    def after_update(self) -> None:
        """The optimizer has stepped: with ZeRO all get all parts; gradients start from zero again."""
        for work in [bucket.spread() for bucket in self.sharded]:
            work.wait()
        for bucket in self.buckets:
            bucket.clear()

    def counters(self) -> Counters:
        """What combining gradients has cost so far, the gathering of parameters after an update included."""
        sent, waited = sum(bucket.sent for bucket in self.buckets), self._watch.seconds
        counted = self._exchanges.counters() if self._exchanges is not None else Counters()
        return Counters(
            sent + counted.bytes,
            waited + counted.exposed_seconds,
            counted.compression_seconds,
            sent + counted.formula_bytes,
        )

    def terms(self) -> Iterable[tuple[Tensor, float]]:
        """Every gradient of this rank with the share of its squared norm that this rank adds to the global one."""
        for bucket in self.buckets:
            yield bucket.result, bucket.parts * share(bucket.holding, self._mesh)

    def tied(self) -> Iterable[tuple[str, Tensor]]:
        """Gradients of weights that other stages hold too."""
        for bucket in self.buckets:
            if bucket.holding.tied:
                yield bucket.holding.tied, bucket.result


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
