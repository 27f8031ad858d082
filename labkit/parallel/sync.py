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

Where a parameter's gradient is summed over other axes too (dp_replicate, cp, tp with sequence parallelism), the own
part is summed over those afterwards. All of that is linear, so the order does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from labkit.parallel.cut import Holding
from labkit.parallel.mesh import REDUCED, Mesh

Named = list[tuple[str, nn.Parameter, Holding]]


def summed_axes(holding: Holding) -> tuple[str, ...]:
    """Axes over which the gradient of such a parameter is added up."""
    return tuple(axis for axis in REDUCED if axis not in holding.cuts) + tuple(sorted(holding.partial))


def copies(holding: Holding, mesh: Mesh) -> int:
    """How many ranks hold the same values of such a parameter (within one pipeline stage)."""
    return mesh.layout.world_size // mesh.size("pp", *holding.cuts)


class Bucket:
    """Parameters whose gradients travel together."""

    def __init__(self, named: Named, mesh: Mesh, stage: int) -> None:
        self.names = [name for name, _, _ in named]
        self.parameters = [parameter for _, parameter, _ in named]
        self.holding = named[0][2]
        self.stage, self.mesh = stage, mesh
        self.decays = self.parameters[0].dim() >= 2
        self.parts = mesh.size("dp_shard") if stage else 1
        self.length = sum(parameter.numel() for parameter in self.parameters)
        self.padded = -(-self.length // self.parts) * self.parts
        self.waiting = len(self.parameters)
        self.work: dist.Work | None = None
        axes = summed_axes(self.holding)
        self.rest = mesh.group(*(axis for axis in axes if not (stage and axis == "dp_shard")))
        self.gradient: Tensor | None = None
        self.own: nn.Parameter | None = None
        self._own_gradient: Tensor | None = None
        if stage:
            self._lay_out_parameters()
        if stage < 2:
            self._lay_out_gradients()

    def _views(self, flat: Tensor) -> list[Tensor]:
        pieces = flat[: self.length].split([parameter.numel() for parameter in self.parameters])
        return [piece.view(parameter.shape) for piece, parameter in zip(pieces, self.parameters, strict=True)]

    def _lay_out_parameters(self) -> None:
        self.values = self.parameters[0].detach().new_zeros(self.padded)
        for view, parameter in zip(self._views(self.values), self.parameters, strict=True):
            view.copy_(parameter.detach())
            parameter.data = view
        size, index = self.padded // self.parts, self.mesh.index("dp_shard")
        self.own = nn.Parameter(self.values[index * size : (index + 1) * size])
        self._own_gradient = torch.zeros_like(self.own)

    def _lay_out_gradients(self) -> None:
        self.gradient = self.parameters[0].detach().new_zeros(self.padded)
        for view, parameter in zip(self._views(self.gradient), self.parameters, strict=True):
            parameter.grad = view

    def send(self) -> None:
        """Start the exchange."""
        if self.stage == 2:
            self._collect()
        flat = self.gradient
        assert flat is not None
        if self.stage:
            self._arrived = flat.new_empty(self.padded // self.parts)
            self.work = dist.reduce_scatter_tensor(
                self._arrived, flat, group=self.mesh.group("dp_shard"), async_op=True
            )
        elif self.rest is not None:
            self.work = dist.all_reduce(flat, group=self.rest, async_op=True)

    def _collect(self) -> None:
        """Stage 2: the gradients of this pass into one stretch, and away with their own memory."""
        flat = self.parameters[0].detach().new_zeros(self.padded)
        for view, parameter in zip(self._views(flat), self.parameters, strict=True):
            if parameter.grad is not None:
                view.copy_(parameter.grad)
                parameter.grad = None
        self.gradient = flat

    def arrive(self) -> None:
        """Wait for the exchange."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        if self.stage:
            assert self._own_gradient is not None
            if self.stage == 2:
                self._own_gradient += self._arrived
                self.gradient = None
            else:
                self._own_gradient.copy_(self._arrived)
            del self._arrived
        self.waiting = len(self.parameters)

    def finish(self) -> None:
        """Sum over the other axes; from here on `gradients()` are those of the whole batch."""
        if self.stage:
            assert self.own is not None
            self.own.grad = self._own_gradient
            if self.rest is not None:
                assert self._own_gradient is not None
                dist.all_reduce(self._own_gradient, group=self.rest)

    def clear(self) -> None:
        """Zero for the next update."""
        for flat in (self.gradient, self._own_gradient):
            if flat is not None:
                flat.zero_()

    def gathered(self, own: Tensor) -> dict[str, Tensor]:
        """Parameter-shaped tensors by name from every rank's part (collective with ZeRO)."""
        flat = own.new_empty(self.padded)
        dist.all_gather_into_tensor(flat, own.contiguous(), group=self.mesh.group("dp_shard"))
        return dict(zip(self.names, self._views(flat), strict=True))

    def taken(self, whole: dict[str, Tensor]) -> Tensor:
        """The own part of parameter-shaped tensors: the inverse of `gathered`."""
        flat = self.values.new_zeros(self.padded)
        for name, view in zip(self.names, self._views(flat), strict=True):
            view.copy_(whole[name].view_as(view))
        size, index = self.padded // self.parts, self.mesh.index("dp_shard")
        return flat[index * size : (index + 1) * size].clone()


class GradientSync:
    """All buckets of one rank. `stage` 0 sums gradients; 1 and 2 are the stages of ZeRO along dp_shard."""

    def __init__(self, named: Named, mesh: Mesh, stage: int, bucket_mb: float) -> None:
        self.stage, self.mesh = stage, mesh
        self.buckets: list[Bucket] = []
        self._last_pass, self._eager = False, True
        limit = bucket_mb * 2**20
        open_: dict[tuple[object, ...], Named] = {}
        # Gradients come in about the opposite order of the parameters.
        for name, parameter, holding in reversed(named):
            kind = (
                summed_axes(holding),
                tuple(sorted(holding.cuts)),
                holding.counted,
                parameter.dim() >= 2,
                parameter.dtype,
            )
            row = open_.setdefault(kind, [])
            row.append((name, parameter, holding))
            if sum(p.numel() * p.element_size() for _, p, _ in row) >= limit:
                self.buckets.append(Bucket(open_.pop(kind), mesh, stage))
        self.buckets += [Bucket(row, mesh, stage) for row in open_.values()]
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._ready(bucket))
            for bucket in self.buckets
            for parameter in bucket.parameters
        ]

    def _ready(self, bucket: Bucket) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if not self._eager or not (self._last_pass or self.stage == 2):
                return
            bucket.waiting -= 1
            if bucket.waiting == 0:
                bucket.send()

        return hook

    def begin_pass(self, last: bool, eager: bool = True) -> None:
        """Before a pass; gradients leave during the last one (with stage 2 during each one) if `eager`."""
        self._last_pass, self._eager = last, eager

    def end_pass(self, last: bool) -> None:
        """After a pass."""
        if not (last or (self.stage == 2 and self._eager)):
            return
        for bucket in self.buckets:
            if bucket.waiting:
                bucket.send()
        for bucket in self.buckets:
            bucket.arrive()
        if last:
            for bucket in self.buckets:
                bucket.finish()

    def optimized(self) -> list[tuple[nn.Parameter, bool]]:
        """What the optimizer works on, and whether it decays."""
        if self.stage:
            return [(bucket.own, bucket.decays) for bucket in self.buckets if bucket.own is not None]
        return [(p, p.dim() >= 2) for bucket in self.buckets for p in bucket.parameters]

    def after_update(self) -> None:
        """ZeRO: every rank has updated its part; all get all parts."""
        if not self.stage:
            return
        works = []
        for bucket in self.buckets:
            assert bucket.own is not None
            works.append(
                dist.all_gather_into_tensor(
                    bucket.values,
                    bucket.own.detach().clone(),
                    group=self.mesh.group("dp_shard"),
                    async_op=True,
                )
            )
        for work in works:
            work.wait()

    def zero(self) -> None:
        for bucket in self.buckets:
            bucket.clear()

    def terms(self) -> Iterable[tuple[Tensor, float]]:
        """Every gradient of this rank with the share of its squared norm that this rank adds to the global one."""
        for bucket in self.buckets:
            share = bucket.parts / copies(bucket.holding, self.mesh) if bucket.holding.counted else 0.0
            if self.stage:
                assert bucket.own is not None
                assert bucket.own.grad is not None
                yield bucket.own.grad, share
            else:
                assert bucket.gradient is not None
                yield bucket.gradient, share
