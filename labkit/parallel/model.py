"""The model of one rank: the layout applied to a workload's model, and one pass forward and backward through it.

Order of application: cut the chain into stages (pp), cut layers (tp), then either shard what is left with `fully_shard`
(ZeRO 3) or lay its gradients out in buckets (`GradientSync`: no sharding, ZeRO 1 and 2). Plain data parallelism takes
torch's DDP instead, which overlaps best and to which compression hooks belong.

Losses are weighed so that gradients have to be *added up* over ranks, microbatches and passes, never averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from labkit.experiment import Experiment
from labkit.parallel import shard as fsdp
from labkit.parallel import stages, tensor
from labkit.parallel.cut import Holding, holding
from labkit.parallel.mesh import Mesh, sum_over
from labkit.parallel.pipeline import Pipeline
from labkit.parallel.sync import GradientSync, copies, summed_axes
from labkit.workloads.base import Batch, Blocks, Task

Phase = Callable[[str], None]


class ParallelModel:
    """What the trainer drives, for every layout but plain data parallelism."""

    averaged_over = 1
    """Nothing is averaged over ranks: gradients add up."""

    def __init__(self, experiment: Experiment, task: Task, mesh: Mesh, device: torch.device) -> None:
        layout = experiment.layout
        self.mesh, self.task, self.layout = mesh, task, layout
        self._weight = 1.0
        self._batch: Batch = {}
        self.stages = self._cut_into_stages(task.model)
        """Stage number to module; one stage, the whole model, without a pipeline."""
        if layout.tp > 1:
            for module in self.stages.values():
                tensor.apply(module, mesh, layout.sequence_parallel)
        self.holdings: dict[str, Holding] = {
            name: holding(parameter) for module in self.stages.values() for name, parameter in module.named_parameters()
        }
        self.sharded = layout.dp_shard > 1 and layout.zero_stage == 3
        self.sync: GradientSync | None = None
        if self.sharded:
            for module in self.stages.values():
                fsdp.shard(module, _blocks(module), mesh)
        else:
            stage = layout.zero_stage if layout.dp_shard > 1 else 0
            named = [(name, parameter, self.holdings[name]) for name, parameter in self.named_parameters()]
            self.sync = GradientSync(named, mesh, stage, experiment.gradients.bucket_mb)
        self.pipeline = Pipeline(self.stages, layout, mesh, device, self._stage_loss) if layout.pp > 1 else None
        last = self.pipeline is None or self.pipeline.last
        self.reports = last and mesh.index("tp", "cp") == 0
        """This rank's losses and metrics count (others with the same samples hold the same or nothing)."""
        self.writer = mesh.writer
        """The rank that keeps the whole state of this rank's stages in a checkpoint."""

    def _cut_into_stages(self, model: nn.Module) -> dict[int, nn.Module]:
        if self.layout.pp == 1:
            return {0: model}
        assert isinstance(model, Blocks)
        names = list(model.blocks)
        count = self.layout.pp * self.layout.stages_per_rank
        groups = stages.groups(names, stages.minimal_maximum([1.0] * len(names), count))
        mine = stages.held_by(self.layout, self.mesh.index("pp"))
        return {number: Blocks({name: model.blocks[name] for name in groups[number]}) for number in mine}

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        for module in self.stages.values():
            yield from module.named_parameters()

    # -- one update ---------------------------------------------------------------------------------------------------

    def optimized(self) -> list[tuple[nn.Parameter, bool]]:
        """What the optimizer works on, and whether it decays (weights do, biases and gains do not)."""
        if self.sync is not None:
            return self.sync.optimized()
        return [(parameter, parameter.dim() >= 2) for _, parameter in self.named_parameters()]

    def run_pass(self, batch: Batch, weight: float, last: bool, phase: Phase, autocast: Any) -> Tensor | None:
        """Forward and backward; the mean loss over the batch on ranks that know it.

        `weight`: share of these samples in the update; the gradients of all shares add up to the update's.
        """
        samples = len(next(iter(batch.values())))
        if self.sharded:
            weight *= fsdp.averaged_over(self.mesh)
        if self.pipeline is not None:
            return self._run_schedule(batch, samples, weight, last, phase, autocast)
        model = self.stages[0]
        if self.sync is not None:
            self.sync.begin_pass(last)
        else:
            model.set_requires_gradient_sync(last)  # type: ignore[operator]
        phase("forward")
        with autocast():
            loss = self.task.loss(model(batch["x"]), batch)
        phase("backward")
        (loss * weight).backward()
        if self.sync is not None:
            self.sync.end_pass(last)
        elif last:
            self._sum_rest()
        return loss.detach() if self.reports else None

    def _run_schedule(
        self, batch: Batch, samples: int, weight: float, last: bool, phase: Phase, autocast: Any
    ) -> Tensor | None:
        assert self.pipeline is not None
        self._batch, self._weight = batch, weight / samples
        phase("forward")
        if self.sync is not None:
            self.sync.begin_pass(last, eager=False)
        else:
            for module in self.stages.values():
                fsdp.hold_back(module)
        with autocast():
            losses = self.pipeline.run(batch["x"], samples)
        phase("backward")
        if self.sync is not None:
            self.sync.end_pass(last)
        else:
            for module in self.stages.values():
                fsdp.exchange(module)
            if last:
                self._sum_rest()
        self._batch = {}
        return torch.stack(losses).sum().detach() / weight if losses and self.reports else None

    def _stage_loss(self, output: Tensor, index: Tensor) -> Tensor:
        part = {name: value[index] for name, value in self._batch.items()}
        return self.task.loss(output, part) * (len(index) * self._weight)

    def _sum_rest(self) -> None:
        """Sharded gradients over the axes that `fully_shard` does not know."""
        done = {"dp_replicate", "dp_shard"}
        rows: dict[tuple[str, ...], list[Tensor]] = {}
        for name, parameter in self.named_parameters():
            axes = tuple(axis for axis in summed_axes(self.holdings[name]) if axis not in done)
            if self.mesh.group(*axes) is not None and parameter.grad is not None:
                rows.setdefault(axes, []).append(fsdp.local(parameter.grad))
        for axes, gradients in rows.items():
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            sum_over(flat, self.mesh.group(*axes))
            for gradient, piece in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(piece.view_as(gradient))

    def grad_norm(self) -> Tensor:
        """The norm of the update's whole gradient, equal on all ranks."""
        total = torch.zeros((), dtype=torch.float64)
        for gradient, share in self._terms():
            total = total.to(gradient.device) + gradient.detach().double().square().sum() * share
        if dist.is_initialized():
            dist.all_reduce(total)
        return total.sqrt()

    def clip(self, limit: float) -> Tensor:
        """Scale all gradients so that their global norm is at most `limit`; returns the norm before."""
        norm = self.grad_norm()
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        for gradient, _ in self._terms():
            gradient.mul_(factor.to(gradient.dtype))
        return norm

    def _terms(self) -> Iterable[tuple[Tensor, float]]:
        if self.sync is not None:
            yield from self.sync.terms()
            return
        for name, parameter in self.named_parameters():
            if parameter.grad is not None:
                held = self.holdings[name]
                share = self.mesh.size("dp_shard") / copies(held, self.mesh) if held.counted else 0.0
                yield fsdp.local(parameter.grad), share

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer has stepped."""
        if self.sync is not None:
            self.sync.after_update()
            self.sync.zero()
        else:
            optimizer.zero_grad()

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def output(self, x: Tensor) -> Tensor | None:
        """Output of the whole model; None on ranks that do not hold the last stage. All ranks call it together."""
        if self.pipeline is not None:
            return self.pipeline.forward(x)
        out: Tensor = self.stages[0](x)
        return out

    def train(self, mode: bool = True) -> None:
        for module in self.stages.values():
            module.train(mode)


def _blocks(module: nn.Module) -> list[nn.Module]:
    return list(module.blocks.values()) if isinstance(module, Blocks) else []
