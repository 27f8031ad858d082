"""What one rank trains with: the task, tried, sharded and changed by the methods that the experiment names.

The order matters. The task is rehearsed as it was built; sparse and quantized layers take the place of its own before
the layout shards the model; the optimizer gets the shards; update rule and masks see the optimizer. Nothing here trains
or restores a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from labkit.experiment import Experiment
from labkit.experiment.fault import TaskFault
from labkit.experiment.update_rule import update_rule
from labkit.gradients.exchange import GradientReducer
from labkit.gradients.updates.update import UpdateContext, UpdateRule
from labkit.gradients.wire import Communicator
from labkit.parallel import shared_memory
from labkit.parallel.cast import at_least_float32, place_module
from labkit.parallel.cut import ShardSpec
from labkit.parallel.entries import OptimizerShards
from labkit.parallel.model import ParallelModel
from labkit.parallel.replicate import ReplicatedModel
from labkit.quantization.narrowing import PrecisionController
from labkit.quantization.scaling import LossScaling
from labkit.sparsity.csr import CsrLinear
from labkit.sparsity.masks import Masks
from labkit.sparsity.method import SparsityContext
from labkit.training import slow
from labkit.training.clock import clock
from labkit.training.compiled import Compiled
from labkit.training.intervals import Intervals
from labkit.training.meter import Board, Meter
from labkit.training.optimizers import learning_rate, make_optimizer
from labkit.training.rehearsal import hooks
from labkit.training.rehearsal.rehearse import rehearse
from labkit.training.runtime import Runtime
from labkit.training.sampling import BatchOrder
from labkit.workloads.base import Task


class TrainingSetup:
    """Model, optimizer and methods of one rank, ready for step 0 or for a checkpoint."""

    def __init__(self, experiment: Experiment, task: Task, runtime: Runtime, meter: Meter, board: Board) -> None:
        self.experiment, self.task, self.runtime, self.meter = experiment, task, runtime, meter
        training = experiment.training
        module = self._place_task()
        self.order = BatchOrder(len(task.train), training.global_batch, training.seed)
        self.steps = training.steps or self.order.steps(training.epochs or 1)
        self.intervals = Intervals(experiment, self.steps)
        rehearsed = rehearse(experiment, task, runtime, self.order, meter.phase)
        meter.events.write("rehearsal", **rehearsed.event())
        if rehearsed.irregular:
            experiment = runtime.expect_gaps(experiment)

        method, options = experiment.sparsity.load()
        shapes, units = method.shapes(module, options), method.units(module)
        sample: Callable[[], Any] = lambda: runtime.place(task.train.__getitems__([0]))["x"]  # noqa: E731
        sparse_layers = method.prepare(module, experiment, options, shapes, sample)
        self.parameters = sum(parameter.numel() for parameter in module.parameters())
        """Number of parameters of the whole model."""
        hooked_names = hooks.hooked(module)
        place = runtime.mesh.index("dp_replicate", "dp_shard", "pp", "cp", "ep")
        self.narrowing = PrecisionController(experiment, place, self.steps, runtime.device)
        self.narrowing.convert(module)
        self.compiled = Compiled(experiment, module, runtime.device)
        del module  # a layout may free the parts that belong to other ranks
        scaler = runtime.accelerator.scaler
        self.scaling = LossScaling(scaler, runtime.device) if scaler is not None else None

        self._clock = clock(runtime.device) if runtime.device.type == "cuda" else None
        self.exchanges = GradientReducer(experiment, self.steps, self._clock)
        rule, rule_options = update_rule(experiment).load()
        self.model = self._apply_layout(experiment, rule)
        if message := hooks.lost_in(hooked_names, self.model.stages.values()):
            raise TaskFault(message)
        factor = experiment.launch.slowdown.get(runtime.rank, 1.0)
        self.run_pass = slow.slow_down(self.model.run_pass, factor, runtime.device, meter)
        self.optimizer = self._make_optimizer()
        self.exchanges.attach_optimizer(self.optimizer)

        def next_sync_step(step: int) -> int:
            due, stop = self.intervals.next_due(step), board.stops_at
            return due if stop is None else min(due, stop)

        self.update: Any = rule(  # an UpdateRule, or an AsyncUpdateRule with a work queue
            UpdateContext(
                experiment,
                rule_options,
                task.model,
                self.optimizer,
                Communicator(clock=self._clock),
                self.steps,
                self.lr,
                runtime.folder,
                runtime.timeout_s,
                rehearsed.irregular,
                next_sync_step,
            )
        )
        self.model.shard_specs |= {
            name: ShardSpec(pattern=layer.pattern)
            for name, layer in sparse_layers.items()
            if isinstance(layer, CsrLinear)
        }
        masks = Masks(OptimizerShards(self.model, shapes), self.optimizer)
        self.sparsity = method(SparsityContext(experiment, options, masks, shapes, self.steps, sparse_layers, units))
        self.warnings: list[str] = [*rehearsed.notes, *self.sparsity.notes()]

    def lr(self, step: int) -> float:
        """Return the learning rate of step `step`."""
        return learning_rate(self.experiment.optimizer, step, self.steps)

    def _place_task(self) -> nn.Module:
        """Cast the model, and the loss if it is a module, to the dtype of the run, and return the model.

        Both are moved to this rank's device, but a model that ranks shard stays on the host until it is cut.
        """
        device, dtype = self.runtime.device, self.runtime.dtype
        where = torch.device("cpu") if self.runtime.is_sharded else device
        module = place_module(self.task.model, where, dtype)
        if isinstance(loss_module := getattr(self.task, "loss_module", None), nn.Module):
            place_module(loss_module, device, at_least_float32(dtype))
        return module

    def _apply_layout(self, experiment: Experiment, rule: type[UpdateRule]) -> ReplicatedModel | ParallelModel:
        """Return the task's model under the layout of the experiment (collective)."""
        runtime, task = self.runtime, self.task
        if runtime.is_sharded:
            autocast = runtime.accelerator.autocast
            return ParallelModel(experiment, task, runtime.mesh, runtime.device, autocast, self.exchanges)
        model = ReplicatedModel(experiment, task, runtime.mesh, runtime.accelerator, self.exchanges, rule.uses_ddp)
        if rule.uses_ddp:
            model.set_up_exchange(
                runtime.folder if shared_memory.uses_shared_memory(experiment) else None, runtime.timeout_s
            )
            if (memory := model.memory) is not None:
                self.meter.spin_wait_seconds = lambda: memory.spin_wait_seconds
        return model

    def _make_optimizer(self) -> Any:
        """Return the optimizer of this rank's parameters, or of its shards of them."""
        own = self.narrowing.optimizer() or self.exchanges.optimizer()
        optimizer = make_optimizer(self.exchanges.inner_optimizer_config(), self.model.optimizer_parameters(), own)
        if self.narrowing.needs_own_optimizer and self.model.tied:
            raise ValueError(
                f"{self.model.tied[0]} is stored on two stages, whose copies would be rounded differently and drift "
                "apart: choose another precision, or 32 bits for the optimizer's state"
            )
        return optimizer
