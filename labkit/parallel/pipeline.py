"""Pipeline parallelism: each rank holds some stages of the model, microbatches walk through them.

The schedules are those of `torch.distributed.pipelining`. `naive` is GPipe with a single microbatch: one stage works
while all others wait, the seed of the idea.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import schedules as torch_schedules

from labkit.experiment.layout import Layout
from labkit.parallel.cast import as_reals
from labkit.parallel.mesh import Mesh
from labkit.parallel.stages import places
from labkit.parallel.timeline import TimedStage, Timeline
from labkit.workloads.same_buffers import same_buffers

SCHEDULES = {
    "naive": "ScheduleGPipe",
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved_1f1b": "ScheduleInterleaved1F1B",
    "looped_bfs": "ScheduleLoopedBFS",
    "interleaved_zero_bubble": "ScheduleInterleavedZeroBubble",
    "zbv": "ScheduleZBVZeroBubble",
    "dualpipev": "ScheduleDualPipeV",
}

Loss = Callable[[Tensor, Tensor], Tensor]
"""(output of a microbatch, numbers of its samples) to the loss that is followed backward."""


class _Contiguous(torch.autograd.Function):
    """Lets a tensor through; its gradient comes out in one piece, because it is sent on as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


class _Held(nn.Module):
    """One stage as torch's schedules see it: what is sent is in one piece, and sharding is hidden.

    A sharded module that torch recognises would exchange gradients in the middle of the schedule.

    Before the first batch torch runs every stage to find out shapes, on memory that nobody has written. What is there
    differs from rank to rank, so that ranks that share a mixture of experts would route tokens differently and break
    off. Unless it `computes` what belongs to a batch, a stage sees zeros, and its buffers stay as they are.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.computes = inner, False

    def forward(self, x: Tensor) -> Tensor:
        if self.computes:
            return self._run(x)
        with same_buffers(self.inner):
            return self._run(torch.zeros_like(x, requires_grad=x.requires_grad))

    def _run(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x = _Contiguous.apply(x)  # type: ignore[no-untyped-call]
        out: Tensor = self.inner(x)
        return out.contiguous()


class Pipeline:
    """The stages of one rank and the schedule that drives them."""

    def __init__(
        self, modules: dict[int, nn.Module], layout: Layout, mesh: Mesh, device: torch.device, loss: Loss
    ) -> None:
        group = mesh.group("pp")
        assert group is not None
        count = layout.pp * layout.stages_per_rank
        self.modules, self.group, self.layout, self._mesh = modules, group, layout, mesh
        self.first, self.last = 0 in modules, count - 1 in modules
        self._loss, self._count, self._device = loss, count, device
        self._where = places(layout)
        self._ranks = dist.get_process_group_ranks(group)
        self.timeline = Timeline(device, self.microbatches)
        self._schedule: Any = None

    @property
    def microbatches(self) -> int:
        return 1 if self.layout.schedule == "naive" else self.layout.microbatches

    def run(self, x: Tensor, samples: int) -> list[Tensor]:
        """Forward and backward over a batch of `samples`, cut into microbatches; their losses on the last stage."""
        if self._schedule is None:
            made = getattr(torch_schedules, SCHEDULES[self.layout.schedule])
            single = issubclass(made, torch_schedules.PipelineScheduleSingle)
            held = [
                TimedStage(_Held(module), number, self._count, self._device, group=self.group, timeline=self.timeline)
                for number, module in self.modules.items()
            ]
            stages: Any = held[0] if single else held
            loss = self.timeline.with_loss(self._loss)
            self._schedule = made(stages, self.microbatches, loss_fn=loss, scale_grads=False)
        inputs = (x,) if self.first else ()
        target = torch.arange(samples, device=self._device) if self.last else None
        losses: list[Tensor] = []
        self._schedule.step(*inputs, target=target, losses=losses, return_outputs=False)
        self.timeline.end_pass()
        return losses

    def forward(self, x: Tensor) -> Tensor | None:
        """Forward alone, stage after stage; the output on the ranks that hold the last stage, None elsewhere.

        Shapes travel with the activations, so that the batch may have any size.
        """
        where, ranks, me = self._where, self._ranks, self._mesh.index("pp")
        out: Tensor | None = x if self.first else None
        for number in range(self._count):
            if where[number] != me:
                continue
            if number and where[number - 1] != me:
                out = _receive(ranks[where[number - 1]], self.group, self._device)
            assert out is not None
            out = self.modules[number](out)
            if number + 1 < self._count and where[number + 1] != me:
                _send(out, ranks[where[number + 1]], self.group)
        return out if self.last else None

    def share(self, output: Tensor | None) -> Tensor:
        """The output that the last stage has made, on every rank of the pipeline."""
        holder = self._ranks[self._where[self._count - 1]]
        described = torch.zeros(HEAD, dtype=torch.int64, device=self._device) if output is None else head(output)
        dist.broadcast(described, holder, self.group)
        shared = empty(described) if output is None else output.contiguous()
        dist.broadcast(shared, holder, self.group)
        return shared


# Kind, number of dimensions and shape go ahead of a tensor whose receiver does not know them.
HEAD = 8
_DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.bool,
    torch.complex64,
    torch.complex128,
)


def head(x: Tensor) -> Tensor:
    """What goes ahead of `x`."""
    shape = [_DTYPES.index(x.dtype), x.dim(), *x.shape]
    return torch.tensor(shape + [0] * (HEAD - len(shape)), device=x.device)


def empty(described: Tensor) -> Tensor:
    """Room for what this head has been ahead of."""
    kind, dims, *shape = described.tolist()
    return torch.empty(shape[:dims], dtype=_DTYPES[kind], device=described.device)


def _send(x: Tensor, to: int, group: dist.ProcessGroup) -> None:
    dist.send(head(x), to, group)
    dist.send(as_reals(x.contiguous()), to, group)


def _receive(source: int, group: dist.ProcessGroup, device: torch.device) -> Tensor:
    described = torch.zeros(HEAD, dtype=torch.int64, device=device)
    dist.recv(described, source, group)
    x = empty(described)
    dist.recv(as_reals(x), source, group)
    return x
