"""The model of one rank: the layout applied to a workload's model, and one pass forward and backward through it.

Order of application: cut the chain into stages (pp), shard the sequence (cp), experts (ep) and layers (tp), then either
shard the rest with `fully_shard` (ZeRO 3) or lay its gradients out in buckets (`GradientSync`: no sharding, ZeRO 1, 2).
Plain data parallelism uses torch's DDP instead, which overlaps best and has comm hooks for compression.

Losses are weighed so that gradients have to be *added up* over ranks, micro-batches and passes, never averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from labkit.experiment import Experiment, Layout
from labkit.experiment.registry import registry
from labkit.gradients.exchange import Counters, GradientReducer
from labkit.parallel import balance, context, expert, loss, recompute, stages, tensor, transfer
from labkit.parallel.asynchronous import AsynchronousPipeline
from labkit.parallel.cast import as_reals, at_least_float32, place_tensor, widen
from labkit.parallel.communication import Axes, Communication
from labkit.parallel.cut import shard_spec_of
from labkit.parallel.mesh import Mesh
from labkit.parallel.pipeline import Pipeline
from labkit.parallel.shard import FullySharded
from labkit.parallel.sync import GradientSync, Zero1Bucket
from labkit.parallel.tie import Ties
from labkit.parallel.timeline import Timeline
from labkit.parallel.weigh import counts_samples, is_zero, loss_of, weight_of
from labkit.workloads.base import Batch, Blocks, Task

Phase = Callable[[str], None]
Autocast = Callable[[], AbstractContextManager[Any]]


def _assert_trainable(all_stages: dict[int, nn.Module], layout: Layout) -> None:
    """Raise ValueError if frozen weights leave a rank, or a schedule that splits the backward pass, without work."""
    trained = {number for number, stage in all_stages.items() if any(p.requires_grad for p in stage.parameters())}
    for pp_rank in range(layout.pp):
        if not trained & set(stages.stages_of_rank(layout, pp_rank)):
            numbers = " and ".join(map(str, stages.stages_of_rank(layout, pp_rank)))
            raise ValueError(f"stage {numbers} has nothing to train; cut the model otherwise (layout.stage_blocks)")
    if layout.splits_backward and trained and 0 not in trained:
        # torch looks for a path from the loss to a stage's input, and there is none: the weights would get no gradient.
        raise ValueError(
            f"under {layout.order.name} the first stage must have something to train (layout.stage_blocks)"
        )


def offloads(experiment: Experiment) -> bool:
    """Return whether this rank's shards are offloaded from its GPU to the host's memory."""
    return experiment.layout.cpu_offload and experiment.launch.device == "cuda"


class ParallelModel:
    """The model that the trainer trains, for every layout but plain data parallelism (`ReplicatedModel`)."""

    exchange = "process group"
    """What reduces the gradients; see `ReplicatedModel.exchange`."""

    def __init__(
        self,
        experiment: Experiment,
        task: Task,
        mesh: Mesh,
        device: torch.device,
        autocast: Autocast,
        reducer: GradientReducer,
    ) -> None:
        layout = experiment.layout
        self._autocast, self._device = autocast, device
        self.mesh, self.task, self.layout = mesh, task, layout
        self._weight = 1.0
        self._batch: Batch = {}
        self._ties: Ties | None = None
        self.stages = self._cut_into_stages(experiment, device)
        """Module by stage number; without a pipeline one stage, the whole model."""
        for module in self.stages.values():
            if layout.cp > 1:
                context.apply(module, mesh)
            if layout.ep > 1:
                expert.apply(module, mesh)
            if layout.tp > 1:
                tensor.apply(module, mesh, layout.sequence_parallel)
            if layout.activation_checkpointing != "none":
                recompute.apply(module, layout.activation_checkpointing)
        loss.shard_loss(task, mesh)
        fully_sharded = layout.dp_shard > 1 and layout.zero_stage == 3
        for module in () if fully_sharded else self.stages.values():
            transfer.take(module, device)  # `fully_shard` itself moves one block after the other
        self.shard_specs = {name: shard_spec_of(parameter) for name, parameter in self._named_parameters()}
        self._gradients: GradientSync | FullySharded
        if fully_sharded:
            offload, products = offloads(experiment), self._product_dtype()
            self._gradients = FullySharded(self.stages.values(), self.shard_specs, mesh, offload, products)
        else:
            stage = layout.zero_stage if layout.dp_shard > 1 else 0
            trained = [(name, p, self.shard_specs[name]) for name, p in self._named_parameters() if p.requires_grad]
            tracks_use = not layout.order.asynchronous  # there, stashed weights replace the parameters
            self._gradients = GradientSync(trained, mesh, stage, experiment.gradients, reducer, tracks_use)
        self._overlaps_gather = self._may_overlap_gather(experiment)
        """Whether the next forward pass waits for parameters block by block (ZeRO 1 and 2)."""
        if self._overlaps_gather:
            for module in self.stages.values():
                module.before_block = self._gradients.wait_for_parameters  # type: ignore[assignment]
        self.averaged_over = self._gradients.averaged_over
        for module in self.stages.values():
            expert.set_sample_weight(module, self.averaged_over / experiment.training.global_batch)
        self.on_weights_updated: Callable[[], None] = lambda: None
        """Called after every update, once all ranks have the new weights."""
        self.traffic: Axes | None = None
        """Communication of the traced update by axis; None before it."""
        self._pipeline = self._make_pipeline() if layout.pp > 1 else None
        self._sample_share = 1 / layout.cp
        """Fraction of every sample's sequence that this rank computes."""
        has_loss = self._pipeline is None or self._pipeline.last
        self.metric_weight = self._sample_share if has_loss and mesh.index("tp") == 0 else 0.0
        """Weight of this rank's losses and metrics: other ranks with the same samples have the same values or none."""

    def _cut_into_stages(self, experiment: Experiment, device: torch.device) -> dict[int, nn.Module]:
        layout, model = self.layout, self.task.model
        if layout.pp == 1:
            return {0: model}
        if not isinstance(model, Blocks):
            raise ValueError("a pipeline needs a model that is a chain of blocks (labkit.workloads.base.Blocks)")
        names = list(model.blocks)
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())

        def microbatch() -> Batch:
            samples = experiment.training.global_batch // layout.data_parallel // experiment.gradients.accumulation
            batch = self.task.train.__getitems__(list(range(max(1, samples // layout.microbatches_per_pass))))
            target_dtype = at_least_float32(dtype)
            return {name: place_tensor(x, device, dtype if name == "x" else target_dtype) for name, x in batch.items()}

        lengths = balance.stage_lengths(layout, self.task, device, microbatch)
        all_stages: dict[int, nn.Module] = {
            number: Blocks({name: model.blocks[name] for name in stage_names})
            for number, stage_names in enumerate(stages.split_into_stages(names, lengths))
        }
        _assert_trainable(all_stages, layout)
        self._ties = Ties(all_stages, stages.pp_rank_by_stage(layout), self.mesh)
        if self._ties.names and layout.order.asynchronous:
            raise ValueError(
                f"{self._ties.names[0]} is on two stages, which would have to wait for each other in every update: "
                "an asynchronous pipeline has no tied weights"
            )
        model.blocks.clear()  # the stages of other ranks take no memory here
        return {number: all_stages[number] for number in stages.stages_of_rank(layout, self.mesh.index("pp"))}

    def _may_overlap_gather(self, experiment: Experiment) -> bool:
        """Return whether the forward pass of a block is all that reads its parameters between two updates.

        Sparse methods, labkit's own formats and asynchronous schedules read them at other times, too.
        """
        quantization = experiment.quantization
        own_format = registry("quantization.training")[quantization.training].load().layers_from == "labkit"
        return (
            experiment.gradients.overlap
            and bool(self._gradients.sharded)
            and all(isinstance(module, Blocks) for module in self.stages.values())
            and experiment.sparsity.method == "none"
            and not (own_format or quantization.qat != "none" or self.layout.order.asynchronous)
        )

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield name and parameter of what this rank keeps; a list would keep what `fully_shard` wants to free."""
        for module in self.stages.values():
            yield from module.named_parameters()

    def _product_dtype(self) -> torch.dtype | None:
        """Return the dtype in which autocast computes products; None if nothing is autocast."""
        with self._autocast():
            kind = self._device.type
            return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    def _make_pipeline(self) -> Pipeline:
        runner = AsynchronousPipeline if self.layout.order.asynchronous else Pipeline
        return runner(self.stages, self.layout, self.mesh, self._device, self._stage_loss)

    @property
    def sharded(self) -> Sequence[Zero1Bucket]:
        """Buckets of which each rank updates a shard (ZeRO 1 and 2)."""
        return self._gradients.sharded

    # -- one update ---------------------------------------------------------------------------------------------------

    def optimizer_parameters(self) -> list[tuple[nn.Parameter, bool]]:
        """Return the parameters that the optimizer updates, each with whether weight decay applies to it."""
        return self._gradients.optimizer_parameters()

    def run_pass(self, batch: Batch, weight: float, last: bool, phase: Phase) -> Tensor | None:
        """Run forward and backward over `batch`; return its mean loss, or None on ranks whose loss does not count.

        `weight`: share of these samples in the update, times `averaged_over`; the gradients of all shares add up to
        the gradient of the update. `phase` is called with "forward" and "backward" as each begins.
        """
        self._gradients.begin_pass(last, scheduled=self._pipeline is not None)
        phase("forward")
        weight *= self._sample_share
        if self._pipeline is not None:
            loss = self._run_schedule(self._pipeline, batch, weight)
            phase("backward")  # the schedule interleaves its backward passes with its forward passes
        else:
            with self._autocast():
                output = self.stages[0](batch["x"])
            loss = loss_of(self.task, output, batch, counts=not is_zero(weight))
            phase("backward")
            (loss * weight).backward()
        self._gradients.end_pass(last)
        if last and self._ties is not None:
            self._ties.all_reduce_gradients(self._gradients.tied_gradients())
        return loss.detach() if loss is not None and self.metric_weight else None

    def _run_schedule(self, pipeline: Pipeline, batch: Batch, weight: float) -> Tensor | None:
        samples = len(next(iter(batch.values())))
        batch_weight = 0.0 if is_zero(weight) else weight_of(self.task, batch) if pipeline.last else 1.0
        self._batch, self._weight = batch, weight / batch_weight if batch_weight else 0.0
        with self._autocast():
            losses = pipeline.run(batch["x"], samples)
        self._batch = {}
        if not losses:
            return None
        total = torch.stack(losses).sum()
        return total / weight if batch_weight else total

    def _stage_loss(self, output: Tensor, index: Tensor) -> Tensor:
        microbatch = {name: value[index] for name, value in self._batch.items()}
        weight = float(len(index)) if counts_samples(self.task) else weight_of(self.task, microbatch)
        with torch.autocast(output.device.type, enabled=False):  # the schedule runs under the autocast of the run
            return loss_of(self.task, output, microbatch, counts=weight > 0) * (weight * self._weight)

    def no_sync(self) -> AbstractContextManager[None]:
        """Do nothing: `run_pass` is told which pass reduces the gradients."""
        return nullcontext()

    def grad_norm(self) -> Tensor:
        """Return the norm of the update's gradient over all parameters, equal on all ranks (collective)."""
        total = self._own_square()
        dist.all_reduce(total)
        return total.sqrt()

    def _own_square(self) -> Tensor:
        """Return this rank's term of the squared norm."""
        terms = [
            torch.linalg.vector_norm(as_reals(gradient.detach()), dtype=torch.float64).square() * factor
            for gradient, factor in self._gradients.norm_terms()
        ]
        return torch.stack(terms).sum().to(self._device)

    def clip(self, limit: float) -> Tensor | None:
        """Scale all gradients so that their global norm is at most `limit`; return the norm before.

        Stages of an asynchronous pipeline do not wait for each other: each scales its own part to a norm of at most
        `limit`/√stages, which keeps the bound; the global norm is unknown, and None is returned.
        """
        per_stage = isinstance(self._pipeline, AsynchronousPipeline)
        norm = self._own_square().sqrt() if per_stage else self.grad_norm()
        max_norm = limit / math.sqrt(self.layout.pp) if per_stage else limit
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient, _ in self._gradients.norm_terms():
            gradient.mul_(factor.to(gradient.device, gradient.dtype))
        return None if per_stage else norm

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Start to all-gather parameters and reset gradients after an optimizer step; call `on_weights_updated`."""
        self._gradients.after_update()
        if not self._overlaps_gather:
            self.complete_update()
        self.on_weights_updated()

    def complete_update(self) -> None:
        """Wait until this rank has all weights of the last update: before anything but a forward pass reads them."""
        self._gradients.wait_for_parameters()

    @property
    def tied(self) -> tuple[str, ...]:
        """Names of the weights that several stages hold."""
        return tuple(self._ties.names) if self._ties is not None else ()

    @property
    def pipeline(self) -> Pipeline | None:
        """The stages of the pipeline that this rank runs; None without a pipeline."""
        return self._pipeline

    @property
    def timeline(self) -> Timeline | None:
        """The timeline of the pipeline; None without a pipeline."""
        return self._pipeline.timeline if self._pipeline else None

    def counters(self) -> Counters | None:
        """Return the cost of reducing gradients so far; None if torch reduces them by itself (ZeRO 3)."""
        return self._gradients.counters() if isinstance(self._gradients, GradientSync) else None

    def communication(self) -> Communication | None:
        """Return the communication of the traced update; None before it."""
        return None if self.traffic is None else Communication.from_axes(self.traffic)

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def output(self, x: Tensor) -> Tensor | None:
        """Return the output of the whole model; None on ranks without the last stage (collective)."""
        with self._autocast():
            out: Tensor | None = self.stages[0](x) if self._pipeline is None else self._pipeline.forward(x)
        return None if out is None else widen(out)

    def output_everywhere(self, x: Tensor) -> Tensor:
        """Return the output of the whole model on all ranks (collective)."""
        out = self.output(x)
        if self._pipeline is not None:
            return self._pipeline.broadcast_output(out)
        assert out is not None
        return out

    def train(self, mode: bool = True) -> None:
        for module in self.stages.values():
            module.train(mode)
