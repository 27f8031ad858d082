"""The training loop of one rank."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from labkit.experiment import Experiment
from labkit.experiment.run_directory import RunDirectory
from labkit.netem.counters import LinkCounter
from labkit.parallel.buffers import Buffers
from labkit.parallel.replicate import ReplicatedModel
from labkit.training import evaluation
from labkit.training.after import post_training as afterwards
from labkit.training.batches import MicroBatches
from labkit.training.counting import CommunicationCount
from labkit.training.meter import Board, Meter, peak_bytes
from labkit.training.optimizers import set_learning_rate
from labkit.training.probes.layers import LayerProbe
from labkit.training.probes.step_profile import StepProfile
from labkit.training.probes.trace import Trace
from labkit.training.reporter import Reporter
from labkit.training.runtime import Runtime
from labkit.training.saving import Checkpoints
from labkit.training.setup import TrainingSetup
from labkit.training.shares import Shares
from labkit.training.weights import Weight, Weights
from labkit.workloads.base import Batch, Task

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
        self.runtime, self.meter, self.board, self.events = runtime, meter, board, meter.events
        self.setup = setup = TrainingSetup(experiment, task, runtime, meter, board)
        self.model, self.optimizer, self.run_pass = setup.model, setup.optimizer, setup.run_pass
        self.update, self.sparsity, self.narrowing = setup.update, setup.sparsity, setup.narrowing
        self.compiled, self.scaling, self.steps = setup.compiled, setup.scaling, setup.steps
        self.link = LinkCounter(experiment, runtime)
        self.checkpoints = Checkpoints(setup, directory)
        self.first = self.done = self.checkpoints.start(Path(resume) if resume else None)
        """`first` is the number of optimizer steps before this run, `done` the number so far."""
        setup.exchanges.resume(self.first)
        self.narrowing.start(self.model.stages.values(), self.optimizer, self.first)
        self.model.on_weights_updated = self.narrowing.after_update
        if isinstance(self.model, ReplicatedModel):
            self.model.set_training_module(self.update.training_module())
        self.passes = experiment.gradients.accumulation
        together = self.update.one_batch and not runtime.isolated
        self.weights = Weights(task, runtime, experiment.training.global_batch, self.model.averaged_over, together)
        self.buffers = Buffers(self.model.stages, runtime.mesh) if self.update.one_batch else None
        """Buffers kept equal on all ranks; None under update rules whose ranks diverge."""
        follow = experiment.training.shares == "speed" and runtime.ranks > 1 and not runtime.isolated
        self.shares = Shares(runtime.ranks, follow, runtime.device)
        self.batches = MicroBatches(experiment, task.train, runtime, setup.order, self.shares)
        self.count = CommunicationCount(self.model, self.update, setup.exchanges.compressor_name)
        self.reporter = Reporter(setup, self.count, self.link)
        self.probe: LayerProbe | None = None
        """Layers of this rank as recorded in the last evaluation, on the rank that writes for its stages."""
        trace_step = experiment.training.trace_step
        self.traced = min(self.first + trace_step, self.steps) - 1 if trace_step else None
        self.trace = Trace(experiment, self.model, self.optimizer, runtime.device)
        heartbeat = partial(meter.phase, "checkpoint")  # like one, writing a long trace may take a while
        self.profile = StepProfile(directory, runtime.rank, runtime.device, runtime.folder, heartbeat, self.events)
        self.profile.schedule(experiment.training.profile_step, self.first, self.steps)

    def run(self) -> bool:
        """Train to the end or until a stop is requested; return True if the run was stopped before its end."""
        self.reporter.write_start(self.first)
        self.reporter.write_sparsity(self.first)
        self._compute_once_uncompiled()
        self.model.train()
        stopped = self._train_with_work_queue() if self.update.uses_work_queue else self._train_in_rounds()
        self.events.write("memory", peak_bytes=peak_bytes(self.runtime.device))
        if not stopped:
            self._run_post_training_steps()
        if stopped and self.done > self.checkpoints.last and self.experiment.training.checkpoint_every != 0:
            if self.buffers is not None:
                self.buffers.synchronize()
            self.checkpoints.save(self.done, unscheduled=not self.setup.intervals.evaluates(self.done))
        if not self.update.uses_work_queue:
            self.update.close()
        self.reporter.write_figures(self.first, self.done)
        self.meter.phase("done")
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
        batches = self.update.wrap_dataloader(self.model, self.batches.from_step(self.first, self.steps))
        stopped = False
        self.link.resume()
        while self.done < self.steps:
            stopped = self.board.should_stop(self.runtime.rank, self.done, self.update.max_step_skew)
            if stopped:
                break
            if self.traced is not None and self.done == max(self.first, self.traced - self.update.steps_in_flight):
                self.trace.start()  # micro-batches in flight in the traced step begin before it
            with self.profile.step(self.done):
                if self.done == self.traced:
                    self._traced_step(self.done, batches)
                else:
                    self._step(self.done, batches)
            self.done += 1
            self._evaluate_and_save_if_due(self.done)
        self.model.complete_update()
        self.link.pause()
        return stopped

    def _train_with_work_queue(self) -> bool:
        """Train with a work queue from one evaluation or checkpoint to the next; return True if the run was stopped."""
        rule, shares = self.update, self.runtime.mesh.data_shard[1]
        while self.done < self.steps:
            due = self.setup.intervals.next_due(self.done)
            self.count.begin_step()
            self.link.resume()
            rule.start_epoch(self.done * shares, due * shares)
            stop_seen = False
            while (ticket := rule.next_work(stop=stop_seen)) is not None:
                step, share = divmod(ticket, shares)
                with self.profile.step(step):
                    self._compute_share(ticket, step, share)
                stop_seen = self.board.stop_requested()
            self.meter.phase("optimizer")
            rule.close()
            self.count.take()  # what was sent after this rank's last ticket
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
        meter, rule = self.meter, self.update
        self._begin_step(step, share, ticket)
        rule.fetch_weights()
        batches = self.batches.of_share(step, share, self.runtime.mesh.data_shard[1])
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
            meter.exchanged(self.count.take())
            meter.end()

    # -- one optimizer step ------------------------------------------------------------------------------------------

    def _traced_step(self, step: int, batches: Iterator[Batch]) -> None:
        """Train one step while tracing it, and write the event `trace`."""
        with self.trace as trace, self.compiled.uncompiled():
            self._step(step, batches, trace)
            self.model.complete_update()  # what the step has begun to send belongs to its trace
        self.events.write("trace", step=step + 1, **trace.event_fields())

    def _begin_step(self, step: int, share: int, ticket: int | None = None) -> None:
        """Set the learning rate of a step and seed what is random in this rank's share of it."""
        lr = self.setup.lr(step) * self.update.lr_scale(step)
        self.meter.begin(step, lr, ticket)
        set_learning_rate(self.optimizer, lr)
        self.runtime.seed(self.batches.seed(step, share))
        self.narrowing.begin(step)

    def _step(self, step: int, batches: Iterator[Batch], trace: Trace | None = None) -> None:
        """Train one step: run the micro-batches of this rank, reduce gradients in the last one, step the optimizer."""
        meter = self.meter
        self.count.begin_step()
        self._begin_step(step, self.runtime.rank)
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
        meter.exchanged(self.count.take())
        meter.end()
        self.shares.record(step, meter.compute_seconds, meter.samples)
        self.reporter.write_sparsity(step + 1)

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

    # -- between optimizer steps --------------------------------------------------------------------------------------

    def _evaluate_and_save_if_due(self, step: int) -> None:
        """Evaluate and save if due after `step` steps; at the end always, unless switched off (0)."""
        if self.runtime.isolated:
            return  # replicas that do not train together have nothing to evaluate or to save
        evaluates, saves = self.setup.intervals.evaluates(step), self.setup.intervals.saves(step)
        if not (evaluates or saves):
            return
        self.model.complete_update()
        with self.link.paused():
            if self.buffers is not None:
                self.buffers.synchronize()
            if evaluates:
                self._evaluate(step, last=step == self.steps)
            if saves:
                self.checkpoints.save(step)

    def _evaluate(self, step: int, last: bool) -> None:
        """Evaluate after `step` steps and write the event `evaluation`; `last` also records layers and closed loop."""
        begin = time.perf_counter()
        heartbeat = partial(self.meter.phase, "evaluation")
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
