"""The model of one rank: the layout applied to a workload's model, and one pass forward and backward through it.

Order of application: cut the chain into stages (pp), the sequence (cp), experts (ep) and layers (tp), then either shard
what is left with `fully_shard` (ZeRO 3) or lay its gradients out in buckets (`GradientSync`: no sharding, ZeRO 1, 2).
Plain data parallelism takes torch's DDP instead, which overlaps best and to which compression hooks belong.

Losses are weighed so that gradients have to be *added up* over ranks, microbatches and passes, never averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from labkit.experiment import Experiment, Layout
from labkit.gradients.exchange import Counters, GradientReducer
from labkit.parallel import balance, context, expert, loss, recompute, stages, tensor
from labkit.parallel.asynchronous import AsynchronousPipeline
from labkit.parallel.cast import as_reals, at_least_float32, placed, widened
from labkit.parallel.communication import Axes, Communication
from labkit.parallel.cut import holding
from labkit.parallel.mesh import Mesh
from labkit.parallel.pipeline import Pipeline
from labkit.parallel.shard import FullySharded
from labkit.parallel.sync import GradientSync, Zero1Bucket
from labkit.parallel.tie import Ties
from labkit.parallel.timeline import Timeline
from labkit.parallel.weigh import counts_samples, is_nothing, loss_of, weight_of
from labkit.workloads.base import Batch, Blocks, Task

Phase = Callable[[str], None]
Autocast = Callable[[], AbstractContextManager[Any]]


def _something_to_train(whole: dict[int, nn.Module], layout: Layout) -> None:
    """ValueError where frozen weights leave a rank, or a schedule that splits backward passes, without work."""
    trained = {number for number, stage in whole.items() if any(p.requires_grad for p in stage.parameters())}
    for place in range(layout.pp):
        if not trained & set(stages.held_by(layout, place)):
            named = " and ".join(map(str, stages.held_by(layout, place)))
            raise ValueError(f"stage {named} has nothing to train; cut the model otherwise (layout.stage_blocks)")
    if layout.schedule in stages.SPLITTING and trained and 0 not in trained:
        # torch looks for the way from the loss to a stage's input, and there is none: the weights would get nothing.
        raise ValueError(f"under {layout.schedule} the first stage must have something to train (layout.stage_blocks)")


def offloads(experiment: Experiment) -> bool:
    """Does what this rank owns lie in the host's memory instead of on its GPU?"""
    return experiment.layout.cpu_offload and experiment.launch.device == "cuda"


def _is_asynchronous(experiment: Experiment) -> bool:
    """Does the pipeline run without waiting for updates?"""
    return experiment.gradients.update.method == "pipedream"


class ParallelModel:
    """What the trainer drives, for every layout but plain data parallelism."""

    exchange = "process group"
    """What gradients go through."""

    def __init__(
        self,
        experiment: Experiment,
        task: Task,
        mesh: Mesh,
        device: torch.device,
        autocast: Autocast,
        exchanges: GradientReducer,
    ) -> None:
        layout = experiment.layout
        self._autocast, self._device = autocast, device
        self.mesh, self.task, self.layout = mesh, task, layout
        self._weight = 1.0
        self._batch: Batch = {}
        self._ties: Ties | None = None
        self.stages = self._cut_into_stages(experiment, device)
        """Stage number to module; one stage, the whole model, without a pipeline."""
        for module in self.stages.values():
            if layout.cp > 1:
                context.apply(module, mesh)
            if layout.ep > 1:
                expert.apply(module, mesh)
            if layout.tp > 1:
                tensor.apply(module, mesh, layout.sequence_parallel)
            if layout.activation_checkpointing != "none":
                recompute.apply(module, layout.activation_checkpointing)
        loss.spread(task, mesh)
        named = [pair for module in self.stages.values() for pair in module.named_parameters()]
        self.holdings = {name: holding(parameter) for name, parameter in named}
        self._gradients: GradientSync | FullySharded
        if layout.dp_shard > 1 and layout.zero_stage == 3:
            self._gradients = FullySharded(self.stages.values(), self.holdings, mesh, offloads(experiment))
        else:
            stage = layout.zero_stage if layout.dp_shard > 1 else 0
            trained = [(name, one, self.holdings[name]) for name, one in named if one.requires_grad]
            sees_use = not _is_asynchronous(experiment)  # there, stashed weights take the place of the parameters
            self._gradients = GradientSync(trained, mesh, stage, experiment.gradients, exchanges, sees_use)
        self.averaged_over = self._gradients.averaged_over
        for module in self.stages.values():
            expert.weigh_samples(module, self.averaged_over / experiment.training.global_batch)
        self.then: Callable[[], None] = lambda: None
        """Called after every update, once the weights are whole."""
        self.traffic: Axes | None = None
        """What the traced update has sent; None before it."""
        self._pipeline = self._make_pipeline(experiment) if layout.pp > 1 else None
        self._part = 1 / layout.cp
        """Of every sample, this rank computes such a part."""
        knows = self._pipeline is None or self._pipeline.last
        self.counted = self._part if knows and mesh.index("tp") == 0 else 0.0
        """How much this rank's losses and metrics count: others with the same samples hold the same or nothing."""

    def _cut_into_stages(self, experiment: Experiment, device: torch.device) -> dict[int, nn.Module]:
        layout, model = self.layout, self.task.model
        if layout.pp == 1:
            return {0: model}
        if not isinstance(model, Blocks):
            raise ValueError("a pipeline needs a model that is a chain of blocks (labkit.workloads.base.Blocks)")
        names = list(model.blocks)
        dtype = next(one.dtype for one in model.parameters() if one.is_floating_point())

        def microbatch() -> Batch:
            samples = experiment.training.global_batch // layout.data_parallel // experiment.gradients.accumulation
            pieces = 1 if _is_asynchronous(experiment) else layout.microbatches
            batch = self.task.train.__getitems__(list(range(max(1, samples // pieces))))
            wide = at_least_float32(dtype)
            return {name: placed(x, device, dtype if name == "x" else wide) for name, x in batch.items()}

        lengths = balance.lengths(layout, self.task, device, microbatch)
        whole: dict[int, nn.Module] = {
            number: Blocks({name: model.blocks[name] for name in group})
            for number, group in enumerate(stages.groups(names, lengths))
        }
        _something_to_train(whole, layout)
        self._ties = Ties(whole, stages.places(layout), self.mesh)
        if self._ties.names and _is_asynchronous(experiment):
            raise ValueError(
                f"{self._ties.names[0]} stands on two stages, which would have to wait for each other in every update: "
                "an asynchronous pipeline has no tied weights"
            )
        model.blocks.clear()  # what other ranks hold takes no memory here
        return {number: whole[number] for number in stages.held_by(layout, self.mesh.index("pp"))}

    def _make_pipeline(self, experiment: Experiment) -> Pipeline:
        made = (self.stages, self.layout, self.mesh, self._device, self._stage_loss)
        if _is_asynchronous(experiment):
            options = experiment.gradients.update.options
            return AsynchronousPipeline(*made, stash=options["stash"], horizon=options["predict"])
        return Pipeline(*made)

    @property
    def sharded(self) -> Sequence[Zero1Bucket]:
        """Buckets of which each rank optimizes a part."""
        return self._gradients.sharded

    # -- one update ---------------------------------------------------------------------------------------------------

    def optimized(self) -> list[tuple[nn.Parameter, bool]]:
        """What the optimizer works on, and whether it decays."""
        return self._gradients.optimized()

    def run_pass(self, batch: Batch, weight: float, last: bool, phase: Phase) -> Tensor | None:
        """Forward and backward; the mean loss over the batch on ranks that know it.

        `weight`: share of these samples in the update, times `averaged_over`; the gradients of all shares add up to
        the update's.
        """
        self._gradients.begin_pass(last, scheduled=self._pipeline is not None)
        phase("forward")
        weight *= self._part
        if self._pipeline is not None:
            loss = self._run_schedule(self._pipeline, batch, weight)
            phase("backward")  # the schedule's own backward passes lie between its forward passes
        else:
            with self._autocast():
                output = self.stages[0](batch["x"])
            loss = loss_of(self.task, output, batch, counts=not is_nothing(weight))
            phase("backward")
            (loss * weight).backward()
        self._gradients.end_pass(last)
        if last and self._ties is not None:
            self._ties.add_up(self._gradients.tied())
        return loss.detach() if loss is not None and self.counted else None

    def _run_schedule(self, pipeline: Pipeline, batch: Batch, weight: float) -> Tensor | None:
        samples = len(next(iter(batch.values())))
        whole = 0.0 if is_nothing(weight) else weight_of(self.task, batch) if pipeline.last else 1.0
        self._batch, self._weight = batch, weight / whole if whole else 0.0
        with self._autocast():
            losses = pipeline.run(batch["x"], samples)
        self._batch = {}
        if not losses:
            return None
        total = torch.stack(losses).sum()
        return total / weight if whole else total

    def _stage_loss(self, output: Tensor, index: Tensor) -> Tensor:
        part = {name: value[index] for name, value in self._batch.items()}
        counted = float(len(index)) if counts_samples(self.task) else weight_of(self.task, part)
        with torch.autocast(output.device.type, enabled=False):  # the schedule runs under that of the run
            return loss_of(self.task, output, part, counts=counted > 0) * (counted * self._weight)

    def no_sync(self) -> AbstractContextManager[None]:
        """Which pass exchanges gradients is told to `run_pass`."""
        return nullcontext()

    def grad_norm(self) -> Tensor:
        """The norm of the update's whole gradient, equal on all ranks."""
        total = self._own_square()
        dist.all_reduce(total)
        return total.sqrt()

    def _own_square(self) -> Tensor:
        """What this rank adds to the square of the norm."""
        parts = [
            as_reals(gradient.detach()).double().square().sum() * share for gradient, share in self._gradients.terms()
        ]
        return torch.stack(parts).sum().to(self._device)

    def clip(self, limit: float) -> Tensor | None:
        """Scale all gradients so that their global norm is at most `limit`; returns the norm before.

        Stages of an asynchronous pipeline do not wait for each other: each scales its own part to a norm of at most
        `limit`/√stages, which keeps the bound, and nobody knows the norm of the whole.
        """
        apart = isinstance(self._pipeline, AsynchronousPipeline)
        norm = self._own_square().sqrt() if apart else self.grad_norm()
        most = limit / math.sqrt(self.layout.pp) if apart else limit
        factor = (most / (norm + 1e-6)).clamp(max=1.0)
        for gradient, _ in self._gradients.terms():
            gradient.mul_(factor.to(gradient.device, gradient.dtype))
        return None if apart else norm

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer has stepped."""
        self._gradients.after_update()
        self.then()

    @property
    def tied(self) -> tuple[str, ...]:
        """Weights of which several stages have a copy."""
        return tuple(self._ties.names) if self._ties is not None else ()

    @property
    def pipeline(self) -> Pipeline | None:
        """The part of this rank; None without stages."""
        return self._pipeline

    @property
    def timeline(self) -> Timeline | None:
        """That of the pipeline, if there is one."""
        return self._pipeline.timeline if self._pipeline else None

    def counters(self) -> Counters | None:
        """What combining gradients has cost so far; None where torch does it by itself (ZeRO 3)."""
        return self._gradients.counters() if isinstance(self._gradients, GradientSync) else None

    def communication(self) -> Communication | None:
        """What the traced update has sent; None before it."""
        return None if self.traffic is None else Communication.of(self.traffic)

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def output(self, x: Tensor) -> Tensor | None:
        """Output of the whole model; None on ranks that do not hold the last stage. All ranks call it together."""
        with self._autocast():
            out: Tensor | None = self.stages[0](x) if self._pipeline is None else self._pipeline.forward(x)
        return None if out is None else widened(out)

    def output_everywhere(self, x: Tensor) -> Tensor:
        """Output of the whole model, on all ranks."""
        out = self.output(x)
        if self._pipeline is not None:
            return self._pipeline.share(out)
        assert out is not None
        return out

    def train(self, mode: bool = True) -> None:
        for module in self.stages.values():
            module.train(mode)
