"""Pipeline parallelism: each rank holds some stages of the model, and micro-batches pass through them one by one.

The schedules are those of `torch.distributed.pipelining`; its runtime also runs those of your own. `naive` is GPipe
with a single micro-batch: one stage works while all others wait, the starting point of the idea.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import schedules as torch_schedules

from labkit.experiment.layout import Layout
from labkit.parallel.action_order import read_order
from labkit.parallel.cast import as_reals
from labkit.parallel.mesh import Mesh
from labkit.parallel.stages import pp_rank_by_stage
from labkit.parallel.timeline import TimedStage, Timeline
from labkit.workloads.same_buffers import same_buffers

Loss = Callable[[Tensor, Tensor], Tensor]
"""(output of a micro-batch, indices of its samples) to the training loss."""


class _Contiguous(torch.autograd.Function):
    """The identity, with a contiguous gradient, because the gradient is sent to the previous stage as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


class _StageModule(nn.Module):
    """One stage as torch's schedules see it: its outputs and gradients are contiguous, and its sharding is hidden.

    A sharded module that torch recognises would exchange gradients in the middle of the schedule.

    Before the first batch torch runs every stage on uninitialised memory to infer shapes. Its content differs from rank
    to rank, so that ranks that share a mixture of experts would route tokens differently and fail. Unless it computes
    on a batch (`has_batch`), a stage gets zeros as input, and its buffers stay unchanged.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.has_batch = inner, False

    def forward(self, x: Tensor) -> Tensor:
        if self.has_batch:
            return self._run(x)
        with same_buffers(self.inner):
            return self._run(torch.zeros_like(x, requires_grad=x.requires_grad))

    def _run(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x = _Contiguous.apply(x)  # type: ignore[no-untyped-call]
        out: Tensor = self.inner(x)
        return out.contiguous()


def _schedule_class(layout: Layout) -> Any:
    """Return the class of torch that runs the schedule of a layout."""
    own_class = layout.order.own_class
    return getattr(torch_schedules, layout.order.torch_class) if own_class is None else _in_own_order(own_class, layout)


def _in_own_order(own_class: Any, layout: Layout) -> type:
    """Return a class that lets torch's runtime run the actions of an own schedule, which have been checked before."""

    class InOwnOrder(torch_schedules._PipelineScheduleRuntime):
        def __init__(self, stages: list[TimedStage], microbatches: int, **options: Any) -> None:
            super().__init__(stages, microbatches, **options)  # type: ignore[no-untyped-call]
            order = read_order(own_class.actions, layout)
            self.pipeline_order = {
                pp_rank: [torch_schedules._Action.from_str(str(action)) for action in actions]
                for pp_rank, actions in order.items()
            }
            self._prepare_schedule_with_comms(self.pipeline_order)

    return InOwnOrder


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
        self._pp_rank_of_stage = pp_rank_by_stage(layout)
        self._ranks = dist.get_process_group_ranks(group)
        self.timeline = Timeline(device, self.microbatches)
        self._schedule: Any = None

    @property
    def microbatches(self) -> int:
        """Number of micro-batches per pass."""
        return self.layout.microbatches_per_pass

    def run(self, x: Tensor, samples: int) -> list[Tensor]:
        """Run forward and backward over a batch of `samples`, split into micro-batches.

        Returns the losses of the micro-batches on the rank with the last stage, an empty list elsewhere.
        """
        if self._schedule is None:
            schedule_class = _schedule_class(self.layout)
            single = issubclass(schedule_class, torch_schedules.PipelineScheduleSingle)
            timed_stages = [
                TimedStage(
                    _StageModule(module), number, self._count, self._device, group=self.group, timeline=self.timeline
                )
                for number, module in self.modules.items()
            ]
            stages: Any = timed_stages[0] if single else timed_stages
            loss = self.timeline.with_loss(self._loss)
            self._schedule = schedule_class(stages, self.microbatches, loss_fn=loss, scale_grads=False)
        inputs = (x,) if self.first else ()
        target = torch.arange(samples, device=self._device) if self.last else None
        losses: list[Tensor] = []
        self._schedule.step(*inputs, target=target, losses=losses, return_outputs=False)
        self.timeline.end_pass()
        return losses

    def forward(self, x: Tensor) -> Tensor | None:
        """Run only the forward pass, stage after stage, and return the output; None on ranks without the last stage.

        Shapes are sent with the activations, so the batch may have any size.
        """
        pp_rank_of, ranks, pp_rank = self._pp_rank_of_stage, self._ranks, self._mesh.index("pp")
        out: Tensor | None = x if self.first else None
        for number in range(self._count):
            if pp_rank_of[number] != pp_rank:
                continue
            if number and pp_rank_of[number - 1] != pp_rank:
                out = _receive(ranks[pp_rank_of[number - 1]], self.group, self._device)
            assert out is not None
            out = self.modules[number](out)
            if number + 1 < self._count and pp_rank_of[number + 1] != pp_rank:
                _send(out, ranks[pp_rank_of[number + 1]], self.group)
        return out if self.last else None

    def broadcast_output(self, output: Tensor | None) -> Tensor:
        """Return the last stage's output on every rank of the pipeline; the other ranks pass None (collective)."""
        source = self._ranks[self._pp_rank_of_stage[self._count - 1]]
        header = (
            torch.zeros(HEADER_SIZE, dtype=torch.int64, device=self._device) if output is None else make_header(output)
        )
        dist.broadcast(header, source, self.group)
        result = empty_from_header(header) if output is None else output.contiguous()
        dist.broadcast(result, source, self.group)
        return result


HEADER_SIZE = 8
"""Elements of a header: dtype, number of dimensions and shape of a tensor that its receiver does not know."""
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


def make_header(x: Tensor) -> Tensor:
    """Return the header (dtype, number of dimensions, shape) that is sent before `x`, int64 [HEADER_SIZE]."""
    shape = [_DTYPES.index(x.dtype), x.dim(), *x.shape]
    return torch.tensor(shape + [0] * (HEADER_SIZE - len(shape)), device=x.device)


def empty_from_header(header: Tensor) -> Tensor:
    """Allocate the tensor that a header describes."""
    dtype, dims, *shape = header.tolist()
    return torch.empty(shape[:dims], dtype=_DTYPES[dtype], device=header.device)


def _send(x: Tensor, to: int, group: dist.ProcessGroup) -> None:
    dist.send(make_header(x), to, group)
    dist.send(as_reals(x.contiguous()), to, group)


def _receive(source: int, group: dist.ProcessGroup, device: torch.device) -> Tensor:
    header = torch.zeros(HEADER_SIZE, dtype=torch.int64, device=device)
    dist.recv(header, source, group)
    x = empty_from_header(header)
    dist.recv(as_reals(x), source, group)
    return x
