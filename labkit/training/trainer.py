"""The training loop of one rank."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from labkit.experiment import Experiment
from labkit.experiment.fault import TaskFault
from labkit.experiment.resume import same_ranks, task_code
from labkit.experiment.run_directory import RunDirectory
from labkit.gradients.exchange import Counters, GradientReducer
from labkit.gradients.updates.update import UpdateContext
from labkit.gradients.wire import Communicator
from labkit.netem.counters import LinkCounter
from labkit.parallel import shared_memory, state
from labkit.parallel.buffers import Buffers
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
from labkit.training import checkpoint, evaluation, slow
from labkit.training.after import post_training as afterwards
from labkit.training.clock import clock
from labkit.training.compiled import Compiled
from labkit.training.events import EventWriter
from labkit.training.loaders import end_with_rank
from labkit.training.meter import Board, Meter, host_bytes, peak_bytes
from labkit.training.optimizers import learning_rate, make_optimizer, set_learning_rate
from labkit.training.probes.layers import LayerProbe
from labkit.training.probes.trace import Trace
from labkit.training.rehearsal import hooks
from labkit.training.rehearsal.rehearse import rehearse
from labkit.training.runtime import Runtime
from labkit.training.samples import MicroBatchDataset, SeededMicroBatches, no_collate, unwrap_batch
from labkit.training.sampling import BatchOrder, MicroBatchSampler
from labkit.training.shares import Shares
from labkit.training.weights import Weight, Weights
from labkit.workloads.base import Batch, Task
from labkit.workloads.fetch import fetch
from labkit.workloads.mapped import pages_dropped, scratch_folder

DEFAULT_EVALUATIONS = 10
_SEED_STRIDE = 0x9E3779B97F4A7C15
"""Difference between the seeds of two micro-batches of a step; so large that no seeds of other steps are near."""
WAIT_S = 0.02
"""Seconds between two checks of a rank that waits for another one."""


class Trainer:
    """Training loop of one rank: prepares model, optimizer and data, then `run()` trains."""

    def __init__(
        self,
        experiment: Experiment,
        directory: RunDirectory,
        task: Task,
        runtime: Runtime,
        meter: Meter,
        board: Board,
        resume: str | None,
    ) -> None:
        self.experiment, self.directory, self.task = experiment, directory, task
        self.runtime, self.meter, self.board = runtime, meter, board
        self.events: EventWriter = meter.events
        training = experiment.training
        model = place_module(task.model, runtime.device, runtime.dtype)
        if isinstance(loss_module := getattr(task, "loss_module", None), nn.Module):
            place_module(loss_module, runtime.device, at_least_float32(runtime.dtype))
        self.order = BatchOrder(len(task.train), training.global_batch, training.seed)
        rehearsed = rehearse(experiment, task, runtime, self.order, meter.phase)
        self.events.write("rehearsal", **rehearsed.event())
        if rehearsed.irregular:
            experiment = runtime.expect_gaps(experiment)
        sparsity, sparsity_options = experiment.sparsity.load()
        shapes = sparsity.shapes(model, sparsity_options)
        sparse_units = sparsity.units(model)
        sparse_layers = sparsity.prepare(
            model, experiment, sparsity_options, shapes, lambda: runtime.place(task.train.__getitems__([0]))["x"]
        )
        self.about_model: dict[str, Any] = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "warnings": rehearsed.notes,
        }
        hooked_names = hooks.hooked(model)
        self.steps = training.steps or self.order.steps(training.epochs or 1)
        place = runtime.mesh.index("dp_replicate", "dp_shard", "pp", "cp", "ep")
        self.narrowing = PrecisionController(experiment, place, self.steps, runtime.device)
        self.narrowing.convert(model)
        self.compiled = Compiled(experiment, model, runtime.device)
        del model  # a layout may free the parts that belong to other ranks
        scaler = runtime.accelerator.scaler
        self.scaling = LossScaling(scaler, runtime.device) if scaler is not None else None
        self.passes = experiment.gradients.accumulation
        rule, rule_options = experiment.gradients.update.load()
        on_device = clock(runtime.device) if runtime.device.type == "cuda" else None
        self.exchanges = GradientReducer(experiment, self.steps, on_device)
        self.model: ReplicatedModel | ParallelModel
        if runtime.is_sharded:
            autocast = runtime.accelerator.autocast
            self.model = ParallelModel(experiment, task, runtime.mesh, runtime.device, autocast, self.exchanges)
        else:
            through_ddp = rule.uses_ddp
            self.model = ReplicatedModel(
                experiment, task, runtime.mesh, runtime.accelerator, self.exchanges, through_ddp
            )
            if through_ddp:
                folder = runtime.folder if shared_memory.uses_shared_memory(experiment) else None
                self.model.set_up_exchange(folder, runtime.timeout_s)
                if (memory := self.model.memory) is not None:
                    meter.spin_wait_seconds = lambda: memory.spin_wait_seconds
        if message := hooks.lost_in(hooked_names, self.model.stages.values()):
            raise TaskFault(message)
        factor = experiment.launch.slowdown.get(runtime.rank, 1.0)
        self.run_pass = slow.slow_down(self.model.run_pass, factor, runtime.device, meter)
        self.link = LinkCounter(experiment, runtime)
        settings = self.exchanges.inner_optimizer_config()
        own = self.narrowing.optimizer() or self.exchanges.optimizer()
        self.optimizer = make_optimizer(settings, self.model.optimizer_parameters(), own)
        if self.narrowing.needs_own_optimizer and self.model.tied:
            raise ValueError(
                f"{self.model.tied[0]} is stored on two stages, whose copies would be rounded differently and drift "
                "apart: choose another precision, or 32 bits for the optimizer's state"
            )
        self.exchanges.attach_optimizer(self.optimizer)
        self.update = rule(
            UpdateContext(
                experiment,
                rule_options,
                task.model,
                self.optimizer,
                Communicator(clock=on_device),
                self.steps,
                self._lr,
                runtime.folder,
                runtime.timeout_s,
                rehearsed.irregular,
                self._until,
            )
        )
        self.model.shard_specs |= {
            name: ShardSpec(pattern=layer.pattern)
            for name, layer in sparse_layers.items()
            if isinstance(layer, CsrLinear)
        }
        masks = Masks(OptimizerShards(self.model, shapes), self.optimizer)
        setting = SparsityContext(experiment, sparsity_options, masks, shapes, self.steps, sparse_layers, sparse_units)
        self.sparsity = sparsity(setting)
        self.about_model["warnings"] += self.sparsity.notes()
        self.first = self._load(Path(resume)) if resume else self._start_fresh()
        self.exchanges.resume(self.first)
        self.narrowing.start(self.model.stages.values(), self.optimizer, self.first)
        self.model.on_weights_updated = self.narrowing.after_update
        self._before = Counters()
        """Communication counters at the beginning of the current step."""
        self._sum = Counters()
        """Communication counters summed over all steps of this run."""
        if isinstance(self.model, ReplicatedModel):
            self.model.set_training_module(self.update.training_module())
        self.weights = Weights(
            task,
            runtime,
            training.global_batch,
            self.model.averaged_over,
            self.update.one_batch and not runtime.isolated,
        )
        self.buffers = Buffers(self.model.stages, runtime.mesh) if self.update.one_batch else None
        """Buffers kept equal on all ranks; None under update rules whose ranks diverge."""
        follow = experiment.training.shares == "speed" and runtime.ranks > 1 and not runtime.isolated
        self.shares = Shares(runtime.ranks, follow, runtime.device)
        self.probe: LayerProbe | None = None
        """Layers of this rank as recorded in the last evaluation, on the rank that writes for its stages."""
        self.done = self._saved_at = self.first
        """Number of optimizer steps done so far."""
        trace_step = training.trace_step
        self.traced = min(self.first + trace_step, self.steps) - 1 if trace_step else None
        self.trace = Trace(experiment, self.model, self.optimizer, runtime.device)

    def run(self) -> bool:
        """Train to the end or until a stop is requested; return True if the run was stopped before its end."""
        self._write_start()
        self._write_sparsity(self.first)
        self._compute_once_uncompiled()
        self.model.train()
        stopped = self._train_with_work_queue() if self.update.uses_work_queue else self._train_in_rounds()
        self.events.write("memory", peak_bytes=peak_bytes(self.runtime.device))
        if not stopped:
            self._run_post_training_steps()
        if stopped and self.done > self._saved_at and self.experiment.training.checkpoint_every != 0:
            if self.buffers is not None:
                self.buffers.synchronize()
            self._save(self.done, unscheduled=not self._due(self.done, self._evaluate_every))
        if not self.update.uses_work_queue:
            self.update.close()
        self._write_figures()
        return stopped

    def _compute_once_uncompiled(self) -> None:
        """Run one uncompiled forward pass before blocks are compiled, for hooks that remove themselves after one call.

        A hook that exists when a block is compiled splits it in two, in all blocks that share the compiled code.
        """
        if self.compiled.blocks:
            self.model.train(False)
            with torch.no_grad(), self.compiled.uncompiled():
                self.model.output(self.runtime.place(self.task.train.__getitems__([0]))["x"])

    def _train_in_rounds(self) -> bool:
        """Train in steps that all ranks take together; return True if the run was stopped."""
        batches = self.update.wrap_dataloader(self.model, map(self.runtime.place, self._batches()))
        stopped = False
        self.link.resume()
        while self.done < self.steps:
            stopped = self.board.should_stop(self.runtime.rank, self.done, self.update.max_step_skew)
            if stopped:
                break
            if self.traced is not None and self.done == max(self.first, self.traced - self.update.steps_in_flight):
                self.trace.start()  # micro-batches in flight in the traced step begin before it
            if self.done == self.traced:
                self._traced_step(self.done, batches)
            else:
                self._step(self.done, batches)
            self.done += 1
            self._evaluate_and_save_if_due(self.done)
        self.link.pause()
        return stopped

    def _train_with_work_queue(self) -> bool:
        """Train with a work queue from one evaluation or checkpoint to the next; return True if the run was stopped."""
        rule, shares = self.update, self.runtime.mesh.data_shard[1]
        while self.done < self.steps:
            due = self._next_due(self.done)
            self._before = self._counters() or self._before  # what an evaluation sends does not belong to a step
            self.link.resume()
            rule.start_epoch(self.done * shares, due * shares)
            stop_seen = False
            while (ticket := rule.next_work(stop=stop_seen)) is not None:
                self._compute_share(ticket, *divmod(ticket, shares))
                stop_seen = self.board.stop_requested()
            self.meter.phase("optimizer")
            rule.close()
            self._take_counters()  # what was sent after this rank's last ticket
            self.link.pause()
            rule.sync_weights()
            # The ranks may have noticed the request at different tickets.
            stopped = bool(self.runtime.add_up({"stop_seen": float(stop_seen)})["stop_seen"])
            self.done = rule.claimed_until // shares
            if self.done == due:
                self._evaluate_and_save_if_due(self.done)
            if stopped:
                return self.done < self.steps
        return False

    def _compute_share(self, ticket: int, step: int, share: int) -> None:
        """Compute the gradient over one share of step `step` and hand it to the update rule."""
        meter, runtime, rule = self.meter, self.runtime, self.update
        lr = self._lr(step) * self.update.lr_scale(step)
        meter.begin(step, lr, ticket)
        set_learning_rate(self.optimizer, lr)
        runtime.seed(self._random_state(step, share))
        self.narrowing.begin(step)
        rule.fetch_weights()
        shares = self.runtime.mesh.data_shard[1]
        indices = self.order.micro_batches(step, share, shares, self.passes)
        batches = (runtime.place(fetch(self.task.train, chosen.tolist(), "train")) for chosen in indices)
        for number, (batch, weight) in enumerate(self._weighted_batches(batches)):
            loss = self.run_pass(batch, self._loss_weight(weight.gradient), number == self.passes - 1, meter.phase)
            assert loss is not None
            meter.loss(loss * weight.reported, len(next(iter(batch.values()))))
        meter.phase("optimizer")
        self._clip_or_record_gradient_norm()
        staleness = rule.apply_gradient(ticket)
        self.model.after_update(self.optimizer)
        if staleness is None:
            meter.cancel()
        else:
            meter.staleness(staleness)
            meter.exchanged(self._take_counters())
            meter.end()

    # -- one optimizer step ------------------------------------------------------------------------------------------

    def _traced_step(self, step: int, batches: Iterator[Batch]) -> None:
        """Train one step while tracing it, and write the event `trace`."""
        with self.trace as trace, self.compiled.uncompiled():
            self._step(step, batches, trace)
        self.events.write("trace", step=step + 1, **trace.event_fields())

    def _step(self, step: int, batches: Iterator[Batch], trace: Trace | None = None) -> None:
        """Train one step: run the micro-batches of this rank, reduce gradients in the last one, step the optimizer."""
        meter, runtime = self.meter, self.runtime
        lr = self._lr(step) * self.update.lr_scale(step)
        meter.begin(step, lr)
        self._before = self._counters() or self._before  # what an evaluation sends does not belong to a step
        set_learning_rate(self.optimizer, lr)
        runtime.seed(self._random_state(step, runtime.rank))
        self.narrowing.begin(step)
        samples_seen = 0
        for number, (batch, weight) in enumerate(self._weighted_batches(batches)):
            samples = len(next(iter(batch.values())))
            samples_seen += samples
            last = number == self.passes - 1
            with self.update.forward_backward(self.model, last, step), self.sparsity.effective_weights(step):
                loss = self.run_pass(batch, self._loss_weight(weight.gradient), last, meter.phase)
            if loss is not None:
                meter.loss(loss if weight.reported == 1 else loss * weight.reported, samples * self.model.metric_weight)
        meter.phase("optimizer")
        self.update.before_update(step)
        self.sparsity.before_update(step)
        self._clip_or_record_gradient_norm()
        self.optimizer.step()
        if trace is not None:
            trace.measure()
        self.sparsity.after_update(step)
        staleness = self.update.after_update(step)
        if staleness is not None:
            meter.staleness(staleness)
        self.model.after_update(self.optimizer)
        if self.buffers is not None:
            self.buffers.after_update(samples_seen)
        meter.exchanged(self._take_counters())
        meter.end()
        self.shares.record(step, meter.compute_seconds, meter.samples)
        self._write_sparsity(step + 1)

    def _write_sparsity(self, step: int) -> None:
        """Write the event `sparsity` after masks changed: zeros, weights and new fraction of kept weights by layer."""
        churn = self.sparsity.take_churn()
        if churn is None:
            return
        with self.sparsity.effective_weights():  # the weights that the network uses
            zeros, churn = self.sparsity.masks.zeros(changed=True), self.sparsity.masks.gather_named(churn)
        if self.runtime.rank == 0:
            self._write_zeros(step, zeros, churn)

    def _write_zeros(self, step: int, zeros: dict[str, tuple[int, int]], churn: dict[str, float]) -> None:
        layers = {name: [*counts, churn.get(name, 0.0)] for name, counts in zeros.items()}
        self.events.write("sparsity", step=step, layers=layers)

    def _clip_or_record_gradient_norm(self) -> None:
        """Unscale the gradient, then clip it or record its norm if the experiment asks for that."""
        if self.scaling is not None:
            self.scaling.unscale(self.optimizer)
        limit = self.experiment.optimizer.clip_norm
        if limit is not None:
            norm = self.model.clip(limit)
            if norm is not None:
                self.meter.grad_norm(norm)
        elif self.experiment.training.gradient_norm:
            self.meter.grad_norm(self.model.grad_norm())

    def _lr(self, step: int) -> float:
        """Return the learning lr of step `step`."""
        return learning_rate(self.experiment.optimizer, step, self.steps)

    def _random_state(self, step: int, share: int) -> int:
        """Return the seed of a step and share, for dropout and the like, so that a resumed run repeats them."""
        return (self.experiment.training.seed * 1_000_003 + step) * 4099 + share

    def _counters(self) -> Counters | None:
        """Return the communication counters so far; None if ranks do not communicate or nothing is counted."""
        counters = [part for part in (self.model.counters(), self.update.counters()) if part is not None]
        return sum(counters[1:], counters[0]) if counters else None

    def _take_counters(self) -> Counters | None:
        """Return what was counted since the last call, and add it to the sum of the run."""
        now = self._counters()
        if now is None:
            return None
        difference, self._before = now.since(self._before), now
        self._sum += difference
        return difference

    def _weighted_batches(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Weight]]:
        """Yield the micro-batches of one step with their weights, one by one if weights are known in advance."""
        if not self.weights.by_samples:
            passes = [batch for _, batch in zip(range(self.passes), batches, strict=False)]
            yield from zip(passes, self.weights.of(passes), strict=True)
            return
        for number in range(self.passes):
            if number:
                self.meter.phase("data")
            batch = next(batches)
            yield batch, self.weights.of_samples(len(next(iter(batch.values()))))

    def _loss_weight(self, weight: float) -> Any:
        """Return `weight`, times the loss scale that keeps small float16 gradients from vanishing."""
        return weight if self.scaling is None or not weight else self.scaling.scaled(weight)

    def _batches(self) -> Iterator[Batch]:
        """Return an iterator over the micro-batches of this rank.

        Without loader processes the data set is called directly: a DataLoader in this process could not prefetch, and
        costs more than fetching a batch of small images does.
        """
        share, shares = self.runtime.mesh.data_shard
        follow = self.shares.follow
        sampler = MicroBatchSampler(
            self.order,
            self.first,
            self.steps,
            share,
            shares,
            self.passes,
            lambda: self.shares.weights if follow else None,
        )
        data = MicroBatchDataset(self.task.train, self.runtime.seed if self.runtime.is_sharded else None)
        passes = SeededMicroBatches(sampler, self._seeds_of_pass)
        workers, cuda = self.experiment.training.loader_workers, self.runtime.device.type == "cuda"
        if not workers and not cuda:
            return map(unwrap_batch, map(data.__getitems__, passes))
        loader: Any = DataLoader(
            data,  # type: ignore[arg-type]
            batch_sampler=passes,  # type: ignore[arg-type]
            collate_fn=no_collate,  # type: ignore[arg-type]
            num_workers=workers,
            worker_init_fn=partial(end_with_rank, os.getpid()) if workers else None,
            pin_memory=cuda,
        )
        return map(unwrap_batch, loader)

    def _seeds_of_pass(self, number: int) -> tuple[int, int]:
        """Return the seeds of micro-batch `number` of this run: one for its samples, one for everything else."""
        step, part = divmod(number, self.passes)
        places = (self.runtime.mesh.data_shard[0], self.runtime.rank)
        states = (self._random_state(self.first + step, place) for place in places)
        for_samples, for_pass = ((state + part * _SEED_STRIDE) % 2**63 for state in states)
        return for_samples, for_pass

    # -- between optimizer steps --------------------------------------------------------------------------------------

    def _evaluate_and_save_if_due(self, step: int) -> None:
        """Evaluate and save if due after `step` steps; at the end always, unless switched off (0)."""
        if self.runtime.isolated:
            return  # replicas that do not train together have nothing to evaluate or to save
        evaluates, saves = self._due(step, self._evaluate_every), self._due(step, self._checkpoint_every)
        if not (evaluates or saves):
            return
        with self.link.paused():
            if self.buffers is not None:
                self.buffers.synchronize()
            if evaluates:
                self._evaluate(step, last=step == self.steps)
            if saves:
                self._save(step)

    @property
    def _evaluate_every(self) -> int:
        interval = self.experiment.training.evaluate_every
        return max(1, self.steps // DEFAULT_EVALUATIONS) if interval is None else interval

    @property
    def _checkpoint_every(self) -> int:
        interval = self.experiment.training.checkpoint_every
        return self.steps if interval is None else interval

    def _next_due(self, step: int) -> int:
        """Return the first step count above `step` at which an evaluation or checkpoint is due, at most the end."""
        intervals = [interval for interval in (self._evaluate_every, self._checkpoint_every) if interval > 0]
        return min([self.steps, *((step // interval + 1) * interval for interval in intervals)])

    def _until(self, step: int) -> int:
        """Return the next step at which all ranks synchronise, as far as is known when step `step` begins."""
        due, stop = self._next_due(step), self.board.stops_at
        return due if stop is None else min(due, stop)

    def _due(self, step: int, every: int) -> bool:
        """Return True if an action with the interval `every` is due after `step` steps."""
        return every > 0 and (step % every == 0 or step == self.steps)

    def _evaluate(self, step: int, last: bool) -> None:
        """Evaluate after `step` steps and write the event `evaluation`; `last` also records layers and closed loop."""
        begin = time.perf_counter()

        def heartbeat() -> None:
            self.meter.phase("evaluation")

        heartbeat()
        mesh = self.runtime.mesh
        if last and mesh.rank == mesh.writer:
            self.probe = LayerProbe(self.model.stages, self.model.shard_specs, mesh)
        with self.update.averaged_weights(), self.sparsity.effective_weights(), self.compiled.uncompiled():
            size = evaluation.batch_size(self.experiment, self.runtime.device)
            sums = evaluation.evaluate(self.task, self.model, self.runtime, heartbeat, size, self.probe)
            if last:
                sums |= evaluation.evaluate_closed_loop(
                    self.task, self.model, self.runtime, self.experiment.training.seed, heartbeat
                )
        if self.runtime.rank == 0:
            seconds = time.perf_counter() - begin
            self.events.write("evaluation", step=step, metrics=self.task.metrics(sums), seconds=seconds)
        if self.probe is not None:
            self.events.write("numbers", step=step, **self.probe.event_fields())

    def _run_post_training_steps(self) -> None:
        """Run the requested post-training steps on rank 0 while the other ranks wait (collective)."""
        if not afterwards.is_requested(self.experiment):
            return
        with self.update.averaged_weights(), self.sparsity.effective_weights(), self.compiled.uncompiled():
            if self.runtime.rank == 0:
                heartbeat = partial(self.meter.phase, "evaluation")
                trained = afterwards.Trained(
                    self.experiment,
                    self.task,
                    self.directory,
                    self.model.stages[0],
                    heartbeat,
                    self.runtime.accelerator.autocast,
                    self.probe,
                )
                for event, fields in afterwards.run_steps(trained):
                    self.events.write(event, **fields)
                self.board.open_gate()
            while not self.board.gate_open:  # not a collective, which would time out
                self.meter.phase("evaluation")
                time.sleep(WAIT_S)

    def _save(self, step: int, unscheduled: bool = False) -> None:
        """Save a checkpoint after `step` steps and write the event `checkpoint` (collective)."""
        begin = time.perf_counter()
        self.meter.phase("checkpoint")
        mesh, rank = self.runtime.mesh, self.runtime.rank
        own = self._own(unscheduled)
        self.update.average_replicas(step)
        shards = self.experiment.layout.shards_weights
        scratch = scratch_folder(self.directory.path) if shards else None
        with pages_dropped() if shards else nullcontext():
            weights, moments = state.gather(self.model, self.optimizer, folder=scratch)
            folder = checkpoint.save(
                self.directory,
                step,
                self.experiment,
                checkpoint.Saved(
                    weights,
                    moments,
                    mesh.coordinates["pp"] if mesh.rank == mesh.writer else None,
                    self.update.state() | self.sparsity.state(),
                    own,
                ),
                rank,
                self.runtime.meet if mesh.size("pp") > 1 or own is not None else lambda: None,
                unscheduled,
                task_code(self.experiment) if rank == 0 else "",
            )
            del weights, moments
        self._saved_at = step
        if rank == 0:
            self.events.write(
                "checkpoint",
                step=step,
                path=str(folder.relative_to(self.directory.path)),
                seconds=time.perf_counter() - begin,
            )
            self.events.sync()

    def _own(self, unscheduled: bool) -> state.State | None:
        """Return the state that only this rank has; None if no rank has any.

        This is the error feedback of its compressor and, if the run was stopped, weights that differ between ranks. At
        a scheduled checkpoint ranks average their weights anyway (`average_replicas`).
        """
        diverged = unscheduled and self.update.replicas_diverge
        if not (diverged or self.exchanges.has_local_state):
            return None
        own = {f"compressor.{name}": tensor for name, tensor in self.exchanges.state().items()}
        if diverged:
            weights, moments = state.gather(self.model, self.optimizer, own=True)
            own |= {f"weights.{name}": tensor for name, tensor in weights.items()}
            own |= {f"moments.{name}": tensor for name, tensor in moments.items()}
            own |= {f"rule.{name}": tensor for name, tensor in self.update.local_state().items()}
        return own

    def _load(self, folder: Path) -> int:
        """Restore a checkpoint of any layout from `folder`; return the number of steps it has done."""
        stored = checkpoint.read(folder, self.runtime.rank)
        with checkpoint.as_checkpoint_error(folder):
            self.sparsity.load(stored.shared)  # first, because it decides which weights exist
            state.restore(self.model, self.optimizer, stored.weights, stored.moments)
            self.update.load(stored.shared)
            before = Experiment.from_dict(stored.contents.experiment)
            same = stored.contents.ranks == self.runtime.ranks and same_ranks(before, self.experiment)
            if same and stored.own is not None:
                self._load_own(stored.own)
        return stored.step

    def _load_own(self, own: state.State) -> None:
        """Restore the state that only this rank had."""

        def part(kind: str) -> state.State:
            return {name[len(kind) + 1 :]: tensor for name, tensor in own.items() if name.startswith(f"{kind}.")}

        self.exchanges.load(part("compressor"))
        if weights := part("weights"):
            state.restore(self.model, self.optimizer, weights, part("moments"))
            self.update.load_local_state(part("rule"))

    def _start_fresh(self) -> int:
        """Initialise sparsity and update rule for a run from step 0; return 0."""
        self.sparsity.begin()
        self.update.load({})  # its reference weights are the initial ones
        return 0

    # -- beginning and end --------------------------------------------------------------------------------------------

    def _write_start(self) -> None:
        """Write the event `start`: what was set up and what is in effect."""
        runtime, metric, layers = self.runtime, self.task.metric, self.sparsity.context.layers
        self.events.write(
            "start",
            device=str(runtime.device),
            pid=os.getpid(),
            threads=torch.get_num_threads(),
            first=self.first,
            steps=self.steps,
            host_bytes=host_bytes(),
            metric={
                "key": metric.key,
                "title": metric.title,
                "higher_is_better": metric.higher_is_better,
                "unit": metric.unit,
            },
            facts=self.task.facts(),
            **self.about_model,
            effective={
                "dtype": str(runtime.dtype).removeprefix("torch."),
                "products": str(runtime.product_type()).removeprefix("torch."),
                "compressor": self.exchanges.compressor_name,
                "compiled": self.compiled.effective(),
                "sparse_kernel": f"{self.sparsity.kernel} in {len(layers)} layers" if layers else "none",
                "backend": torch.distributed.get_backend() if torch.distributed.is_initialized() else "none",
                "exchange": self.model.exchange,
            },
        )

    def _write_figures(self) -> None:
        """Write what was counted over the run: communication, zeros, link and precision statistics."""
        measured, about = self.model.communication(), self._about_exchange()
        if measured is not None:
            about = {
                "bytes_per_step": round(measured.wire_bytes),
                "exposed_seconds_per_step": measured.exposed_seconds,
                "axes": measured.axes,
            } | about
        if about:
            self.events.write("communication", **about)
        zeros = self.sparsity.masks.zeros()
        if zeros and self.runtime.rank == 0:
            self._write_zeros(self.done, zeros, {})
        link = self.link.totals()
        if link is not None:
            self.events.write("link", updates=self.done - self.first, **link)
        effective = self.narrowing.statistics() | (self.scaling.statistics() if self.scaling is not None else {})
        if compared := self.sparsity.masks.compared:
            effective["masks_equal_on_ranks"] = compared
        effective |= self.sparsity.statistics()
        if effective:
            self.events.write("effective", found=effective)
        self.meter.phase("done")

    def _about_exchange(self) -> dict[str, Any]:
        """Return communication per step of this run: counted bytes, bytes by formula, compression (seconds)."""
        counted, updates = self._sum, self.done - self.first
        if not updates or self._counters() is None:
            return {}
        rule = self.update.counters()
        of_rule: dict[str, Any] = {} if rule is None else {"bytes_per_step": round(counted.bytes / updates)}
        if rule is not None and not math.isnan(counted.exposed_seconds):
            of_rule["exposed_seconds_per_step"] = counted.exposed_seconds / updates
        return of_rule | {
            "counted_bytes_per_step": counted.bytes / updates,
            "formula_bytes_per_step": counted.formula_bytes / updates,
            "compression_seconds": counted.compression_seconds / updates,
            "method": self.exchanges.compressor_name,
        }
