"""The training loop of one rank."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from labkit.experiment import Experiment
from labkit.experiment.fault import TaskFault
from labkit.experiment.registry import registry
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
from labkit.training.meter import Board, Meter, peak_bytes
from labkit.training.optimizers import learning_rate, make_optimizer, set_learning_rate
from labkit.training.probes.layers import LayerProbe
from labkit.training.probes.trace import Trace
from labkit.training.rehearsal import hooks
from labkit.training.rehearsal.rehearse import rehearse
from labkit.training.runtime import Runtime
from labkit.training.samples import Loaded, Passes, as_it_is, received
from labkit.training.sampling import BatchOrder, MicroBatchSampler
from labkit.training.shares import Shares
from labkit.training.weights import Weight, Weights
from labkit.workloads.base import Batch, Task
from labkit.workloads.fetch import fetch

DEFAULT_EVALUATIONS = 10
_BETWEEN_PASSES = 0x9E3779B97F4A7C15
"""Between the seeds of the passes of one update in loader processes: far from those of other updates."""
WAIT_S = 0.02
"""Between two looks of a rank that waits for another one, which may take long."""


class Trainer:
    """One rank at work: model, optimizer and data prepared, then `run()`."""

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
        whole = place_module(task.model, runtime.device, runtime.dtype)
        if isinstance(loss_module := getattr(task, "loss_module", None), nn.Module):
            place_module(loss_module, runtime.device, at_least_float32(runtime.dtype))
        self.order = BatchOrder(len(task.train), training.global_batch, training.seed)
        rehearsed = rehearse(experiment, task, runtime, self.order, meter.phase)
        self.events.write("rehearsal", **rehearsed.event())
        if rehearsed.irregular:
            experiment = runtime.expect_gaps(experiment)
        sparsity = registry("sparsity")[experiment.sparsity.method].load()
        sparsity_options = sparsity.Options(**experiment.sparsity.options)
        shapes = sparsity.shapes(whole, sparsity_options)
        sparse_units = sparsity.units(whole)
        sparse_layers = sparsity.prepare(
            whole, experiment, sparsity_options, shapes, lambda: runtime.place(task.train.__getitems__([0]))["x"]
        )
        self.about_model: dict[str, Any] = {
            "parameters": sum(parameter.numel() for parameter in whole.parameters()),
            "warnings": rehearsed.notes,
        }
        with_hooks = hooks.hooked(whole)
        self.steps = training.steps or self.order.steps(training.epochs or 1)
        place = runtime.mesh.index("dp_replicate", "dp_shard", "pp", "cp", "ep")
        self.narrowing = PrecisionController(experiment, place, self.steps, runtime.device)
        self.narrowing.convert(whole)
        self.compiled = Compiled(experiment, whole, runtime.device)
        del whole  # a layout may free the parts that other ranks hold
        scaler = runtime.accelerator.scaler
        self.scaling = LossScaling(scaler, runtime.device) if scaler is not None else None
        self.passes = experiment.gradients.accumulation
        rule = registry("gradients.update")[experiment.gradients.update.method].load()
        on_device = clock(runtime.device) if runtime.device.type == "cuda" else None
        self.exchanges = GradientReducer(experiment, self.steps, on_device)
        self.model: ReplicatedModel | ParallelModel
        if runtime.spread:
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
                    meter.spun = lambda: memory.spin_wait_seconds
        if lost := hooks.lost_in(with_hooks, self.model.stages.values()):
            raise TaskFault(lost)
        factor = experiment.launch.slowdown.get(runtime.rank, 1.0)
        self.run_pass = slow.stretched(self.model.run_pass, factor, runtime.device, meter)
        self.link = LinkCounter(experiment, runtime)
        settings = self.exchanges.inner_optimizer_config()
        own = self.narrowing.optimizer() or self.exchanges.optimizer()
        self.optimizer = make_optimizer(settings, self.model.optimizer_parameters(), own)
        if self.narrowing.needs_own_optimizer and self.model.tied:
            raise ValueError(
                f"{self.model.tied[0]} stands on two stages, whose copies would be rounded differently and drift "
                "apart: choose another number format, or 32 bits for the optimizer's state"
            )
        self.exchanges.attach_optimizer(self.optimizer)
        self.update = rule(
            UpdateContext(
                experiment,
                rule.Options(**experiment.gradients.update.options),
                task.model,
                self.optimizer,
                Communicator(clock=on_device),
                self.steps,
                self._rate,
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
        self.first = self._load(Path(resume)) if resume else self._begin_anew()
        self.exchanges.resume(self.first)
        self.narrowing.start(self.model.stages.values(), self.optimizer, self.first)
        self.model.on_weights_updated = self.narrowing.after_update
        self._before = Counters()
        """What combining had cost when the update began."""
        self._sum = Counters()
        """What all updates of this run have cost."""
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
        """Those that the ranks hold in common; under other rules each has its own until they meet."""
        follow = experiment.training.shares == "speed" and runtime.ranks > 1 and not runtime.isolated
        self.shares = Shares(runtime.ranks, follow, runtime.device)
        self.watch: LayerProbe | None = None
        """The layers of this rank as the last evaluation saw them, on the rank that writes for its stages."""
        self.done = self._saved_at = self.first
        """Updates done so far."""
        wanted = training.trace_step
        self.traced = min(self.first + wanted, self.steps) - 1 if wanted else None
        self.trace = Trace(experiment, self.model, self.optimizer, runtime.device)

    def run(self) -> bool:
        """Train to the end or until asked to stop; True if it was stopped before its end."""
        self._write_start()
        self._write_sparsity(self.first)
        self._compute_once_uncompiled()
        self.model.train()
        stopped = self._draw_tickets() if self.update.uses_work_queue else self._go_through_rounds()
        self.events.write("memory", peak_bytes=peak_bytes(self.runtime.device))
        if not stopped:
            self._look_afterwards()
        if stopped and self.done > self._saved_at and self.experiment.training.checkpoint_every != 0:
            if self.buffers is not None:
                self.buffers.synchronize()
            self._save(self.done, unscheduled=not self._due(self.done, self._evaluate_every))
        if not self.update.uses_work_queue:
            self.update.close()
        self._write_figures()
        return stopped

    def _compute_once_uncompiled(self) -> None:
        """Let hooks that wait for their first call (which types are at work) have it before blocks are compiled.

        A hook that is there when a block is compiled splits it in two, in all blocks that share what was compiled.
        """
        if self.compiled.blocks:
            self.model.train(False)
            with torch.no_grad(), self.compiled.uncompiled():
                self.model.output(self.runtime.place(self.task.train.__getitems__([0]))["x"])

    def _go_through_rounds(self) -> bool:
        """Every rank does every update; True if they were stopped."""
        batches = self.update.wrap_dataloader(self.model, map(self.runtime.place, self._batches()))
        stopped = False
        self.link.resume()
        while self.done < self.steps:
            stopped = self.board.should_stop(self.runtime.rank, self.done, self.update.max_step_skew)
            if stopped:
                break
            if self.traced is not None and self.done == max(self.first, self.traced - self.update.steps_in_flight):
                self.trace.watch()  # what the traced update finds under way begins before it
            if self.done == self.traced:
                self._traced_step(self.done, batches)
            else:
                self._step(self.done, batches)
            self.done += 1
            self._after(self.done)
        self.link.pause()
        return stopped

    def _draw_tickets(self) -> bool:
        """Ranks draw work and meet where something is due; True if they were stopped."""
        rule, shares = self.update, self.runtime.mesh.data_shard[1]
        while self.done < self.steps:
            due = self._next_due(self.done)
            self._before = self._counters() or self._before  # what an evaluation sends belongs to no update
            self.link.resume()
            rule.start_epoch(self.done * shares, due * shares)
            asked = False
            while (ticket := rule.next_work(stop=asked)) is not None:
                self._work_on(ticket, *divmod(ticket, shares))
                asked = self.board.stop_requested()
            self.meter.phase("optimizer")
            rule.close()
            self._exchanged()  # what came after this rank's last piece
            self.link.pause()
            rule.sync_weights()
            # Not all have seen the request at the same ticket.
            stopped = bool(self.runtime.add_up({"asked": float(asked)})["asked"])
            self.done = rule.claimed_until // shares
            if self.done == due:
                self._after(self.done)
            if stopped:
                return self.done < self.steps
        return False

    def _work_on(self, ticket: int, step: int, share: int) -> None:
        """One piece of work: the gradient over a share of update `step`, and what the rule makes of it."""
        meter, runtime, rule = self.meter, self.runtime, self.update
        rate = self._rate(step) * self.update.lr_scale(step)
        meter.begin(step, rate, ticket)
        set_learning_rate(self.optimizer, rate)
        runtime.seed(self._random_state(step, share))
        self.narrowing.begin(step)
        rule.fetch_weights()
        shares = self.runtime.mesh.data_shard[1]
        indices = self.order.passes(step, share, shares, self.passes)
        batches = (runtime.place(fetch(self.task.train, chosen.tolist(), "train")) for chosen in indices)
        for number, (batch, weight) in enumerate(self._weighed(batches)):
            loss = self.run_pass(batch, self._scaled(weight.gradient), number == self.passes - 1, meter.phase)
            assert loss is not None
            meter.loss(loss * weight.shown, len(next(iter(batch.values()))))
        meter.phase("optimizer")
        self._measure_gradient()
        stale = rule.apply_gradient(ticket)
        self.model.after_update(self.optimizer)
        if stale is None:
            meter.cancel()
        else:
            meter.staleness(stale)
            meter.exchanged(self._exchanged())
            meter.end()

    # -- one update ---------------------------------------------------------------------------------------------------

    def _traced_step(self, step: int, batches: Iterator[Batch]) -> None:
        """One update, and what it looked like on this rank."""
        with self.trace as trace, self.compiled.uncompiled():
            self._step(step, batches, trace)
        self.events.write("trace", step=step + 1, **trace.found())

    def _step(self, step: int, batches: Iterator[Batch], trace: Trace | None = None) -> None:
        """One update: the passes over this rank's share, the exchange of gradients in the last, the optimizer."""
        meter, runtime = self.meter, self.runtime
        rate = self._rate(step) * self.update.lr_scale(step)
        meter.begin(step, rate)
        self._before = self._counters() or self._before  # what an evaluation sends belongs to no update
        set_learning_rate(self.optimizer, rate)
        runtime.seed(self._random_state(step, runtime.rank))
        self.narrowing.begin(step)
        seen = 0
        for number, (batch, weight) in enumerate(self._weighed(batches)):
            samples = len(next(iter(batch.values())))
            seen += samples
            last = number == self.passes - 1
            with self.update.forward_backward(self.model, last, step), self.sparsity.effective_weights(step):
                loss = self.run_pass(batch, self._scaled(weight.gradient), last, meter.phase)
            if loss is not None:
                meter.loss(loss if weight.shown == 1 else loss * weight.shown, samples * self.model.metric_weight)
        meter.phase("optimizer")
        self.update.before_update(step)
        self.sparsity.before_update(step)
        self._measure_gradient()
        self.optimizer.step()
        if trace is not None:
            trace.measure()
        self.sparsity.after_update(step)
        stale = self.update.after_update(step)
        if stale is not None:
            meter.staleness(stale)
        self.model.after_update(self.optimizer)
        if self.buffers is not None:
            self.buffers.after_update(seen)
        meter.exchanged(self._exchanged())
        meter.end()
        self.shares.computed(step, meter.busy, meter.samples)
        self._write_sparsity(step + 1)

    def _write_sparsity(self, step: int) -> None:
        """After a change of what is zero: by layer, zeros as counted, weights, and what part of those kept is new."""
        churn = self.sparsity.take_churn()
        if churn is None:
            return
        with self.sparsity.effective_weights():  # the weights that the network uses
            zeros, churn = self.sparsity.masks.zeros(changed=True), self.sparsity.masks.gather_named(churn)
        if self.runtime.rank == 0:
            self._tell_zeros(step, zeros, churn)

    def _tell_zeros(self, step: int, zeros: dict[str, tuple[int, int]], churn: dict[str, float]) -> None:
        layers = {name: [*counts, churn.get(name, 0.0)] for name, counts in zeros.items()}
        self.events.write("sparsity", step=step, layers=layers)

    def _measure_gradient(self) -> None:
        """Clip the gradient, or write its norm down, if that was asked for."""
        if self.scaling is not None:
            self.scaling.unscale(self.optimizer)
        limit = self.experiment.optimizer.clip_norm
        if limit is not None:
            norm = self.model.clip(limit)
            if norm is not None:
                self.meter.grad_norm(norm)
        elif self.experiment.training.gradient_norm:
            self.meter.grad_norm(self.model.grad_norm())

    def _rate(self, step: int) -> float:
        return learning_rate(self.experiment.optimizer, step, self.steps)

    def _random_state(self, step: int, share: int) -> int:
        """Everything random in a step (dropout, …) follows from these three, so a resumed run repeats it."""
        return (self.experiment.training.seed * 1_000_003 + step) * 4099 + share

    def _counters(self) -> Counters | None:
        """What combining has cost so far; None where nothing is combined or nobody counts."""
        found = [one for one in (self.model.counters(), self.update.counters()) if one is not None]
        return sum(found[1:], found[0]) if found else None

    def _exchanged(self) -> Counters | None:
        """What combining has cost since the last look at it."""
        now = self._counters()
        if now is None:
            return None
        found, self._before = now.since(self._before), now
        self._sum += found
        return found

    def _weighed(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Weight]]:
        """The passes of one update and what each counts; fetched one by one where that is known before."""
        if not self.weights.by_samples:
            passes = [batch for _, batch in zip(range(self.passes), batches, strict=False)]
            yield from zip(passes, self.weights.of(passes), strict=True)
            return
        for number in range(self.passes):
            if number:
                self.meter.phase("data")
            batch = next(batches)
            yield batch, self.weights.of_samples(len(next(iter(batch.values()))))

    def _scaled(self, weight: float) -> Any:
        """The weight of a mean loss, times the scale that keeps small gradients of float16 from vanishing."""
        return weight if self.scaling is None or not weight else self.scaling.scaled(weight)

    def _batches(self) -> Iterator[Batch]:
        """The passes of this rank, in order.

        Without loader processes the data is asked directly: a DataLoader in this process could not prefetch, and costs
        more than fetching a batch of small images does.
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
        data = Loaded(self.task.train, self.runtime.seed if self.runtime.spread else None)
        passes = Passes(sampler, self._seeds_of_pass)
        workers, cuda = self.experiment.training.loader_workers, self.runtime.device.type == "cuda"
        if not workers and not cuda:
            return map(received, map(data.__getitems__, passes))
        loader: Any = DataLoader(
            data,  # type: ignore[arg-type]
            batch_sampler=passes,  # type: ignore[arg-type]
            collate_fn=as_it_is,  # type: ignore[arg-type]
            num_workers=workers,
            worker_init_fn=partial(end_with_rank, os.getpid()) if workers else None,
            pin_memory=cuda,
        )
        return map(received, loader)

    def _seeds_of_pass(self, number: int) -> tuple[int, int]:
        """Seeds of the pass with this number in the row of this run's passes: for its samples, and for the rest."""
        step, part = divmod(number, self.passes)
        places = (self.runtime.mesh.data_shard[0], self.runtime.rank)
        states = (self._random_state(self.first + step, place) for place in places)
        for_samples, for_the_rest = ((state + part * _BETWEEN_PASSES) % 2**63 for state in states)
        return for_samples, for_the_rest

    # -- between updates ----------------------------------------------------------------------------------------------

    def _after(self, step: int) -> None:
        """What is due after `step` updates: evaluation, checkpoint; always at the end unless switched off (0)."""
        if self.runtime.isolated:
            return  # copies that do not train together have nothing to show or to keep
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
        wanted = self.experiment.training.evaluate_every
        return max(1, self.steps // DEFAULT_EVALUATIONS) if wanted is None else wanted

    @property
    def _checkpoint_every(self) -> int:
        wanted = self.experiment.training.checkpoint_every
        return self.steps if wanted is None else wanted

    def _next_due(self, step: int) -> int:
        """After how many updates, more than `step`, there is something to do; at the end in any case."""
        every = [one for one in (self._evaluate_every, self._checkpoint_every) if one > 0]
        return min([self.steps, *((step // one + 1) * one for one in every)])

    def _until(self, step: int) -> int:
        """After how many updates the ranks stand still next, as far as is known when update `step` begins."""
        due, stop = self._next_due(step), self.board.stops_at
        return due if stop is None else min(due, stop)

    def _due(self, step: int, every: int) -> bool:
        return every > 0 and (step % every == 0 or step == self.steps)

    def _evaluate(self, step: int, last: bool) -> None:
        begun = time.perf_counter()

        def alive() -> None:
            self.meter.phase("evaluation")

        alive()
        mesh = self.runtime.mesh
        if last and mesh.rank == mesh.writer:
            self.watch = LayerProbe(self.model.stages, self.model.shard_specs, mesh)
        with self.update.averaged_weights(), self.sparsity.effective_weights(), self.compiled.uncompiled():
            size = evaluation.batch_size(self.experiment, self.runtime.device)
            sums = evaluation.evaluate(self.task, self.model, self.runtime, alive, size, self.watch)
            if last:
                sums |= evaluation.drive(self.task, self.model, self.runtime, self.experiment.training.seed, alive)
        if self.runtime.rank == 0:
            seconds = time.perf_counter() - begun
            self.events.write("evaluation", step=step, metrics=self.task.metrics(sums), seconds=seconds)
        if self.watch is not None:
            self.events.write("numbers", step=step, **self.watch.found())

    def _look_afterwards(self) -> None:
        """The trained network in other forms, if that was asked for (collective; the first rank makes them)."""
        if not afterwards.wanted(self.experiment):
            return
        with self.update.averaged_weights(), self.sparsity.effective_weights(), self.compiled.uncompiled():
            if self.runtime.rank == 0:
                alive = partial(self.meter.phase, "evaluation")
                trained = afterwards.Trained(
                    self.experiment,
                    self.task,
                    self.directory,
                    self.model.stages[0],
                    alive,
                    self.runtime.accelerator.autocast,
                    self.watch,
                )
                for event, found in afterwards.look(trained):
                    self.events.write(event, **found)
                self.board.open_gate()
            while not self.board.gate_open:  # no collective: it would have to end within its own timeout
                self.meter.phase("evaluation")
                time.sleep(WAIT_S)

    def _save(self, step: int, unscheduled: bool = False) -> None:
        begun = time.perf_counter()
        self.meter.phase("checkpoint")
        mesh, rank = self.runtime.mesh, self.runtime.rank
        own = self._own(unscheduled)
        self.update.average_replicas(step)
        weights, moments = state.gather(self.model, self.optimizer)
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
        self._saved_at = step
        if rank == 0:
            self.events.write(
                "checkpoint",
                step=step,
                path=str(folder.relative_to(self.directory.path)),
                seconds=time.perf_counter() - begun,
            )
            self.events.sync()

    def _own(self, unscheduled: bool) -> state.State | None:
        """What this rank alone has: memories of its compressor; if the run was stopped, weights that are not united.

        At a scheduled checkpoint ranks average their weights anyway (`average_replicas`). None if no rank has any.
        """
        apart = unscheduled and self.update.replicas_diverge
        if not (apart or self.exchanges.has_local_state):
            return None
        own = {f"compressor.{name}": tensor for name, tensor in self.exchanges.state().items()}
        if apart:
            weights, moments = state.gather(self.model, self.optimizer, own=True)
            own |= {f"weights.{name}": tensor for name, tensor in weights.items()}
            own |= {f"moments.{name}": tensor for name, tensor in moments.items()}
            own |= {f"rule.{name}": tensor for name, tensor in self.update.local_state().items()}
        return own

    def _load(self, folder: Path) -> int:
        """Restore what another run left, whatever its layout was; returns the number of updates done."""
        stored = checkpoint.read(folder, self.runtime.rank)
        with checkpoint.fitting(folder):
            self.sparsity.load(stored.more)  # which weights there are to restore
            state.restore(self.model, self.optimizer, stored.weights, stored.moments)
            self.update.load(stored.more)
            before = Experiment.from_dict(stored.contents.experiment)
            same = stored.contents.ranks == self.runtime.ranks and same_ranks(before, self.experiment)
            if same and stored.own is not None:
                self._load_own(stored.own)
        return stored.step

    def _load_own(self, own: state.State) -> None:
        def part(kind: str) -> state.State:
            return {name[len(kind) + 1 :]: tensor for name, tensor in own.items() if name.startswith(f"{kind}.")}

        self.exchanges.load(part("compressor"))
        if weights := part("weights"):
            state.restore(self.model, self.optimizer, weights, part("moments"))
            self.update.load_local_state(part("rule"))

    def _begin_anew(self) -> int:
        self.sparsity.begin()
        self.update.load({})  # what it remembers of the weights is what the network begins with
        return 0

    # -- beginning and end --------------------------------------------------------------------------------------------

    def _write_start(self) -> None:
        runtime, metric, layers = self.runtime, self.task.metric, self.sparsity.context.layers
        self.events.write(
            "start",
            device=str(runtime.device),
            pid=os.getpid(),
            threads=torch.get_num_threads(),
            first=self.first,
            steps=self.steps,
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
            self._tell_zeros(self.done, zeros, {})
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
        """Of combining gradients, per update of this run: bytes counted and by the formula, compression (s)."""
        counted, updates = self._sum, self.done - self.first
        if not updates or self._counters() is None:
            return {}
        rule = self.update.counters()
        whole: dict[str, Any] = {} if rule is None else {"bytes_per_step": round(counted.bytes / updates)}
        if rule is not None and not math.isnan(counted.exposed_seconds):
            whole["exposed_seconds_per_step"] = counted.exposed_seconds / updates
        return whole | {
            "counted_bytes_per_step": counted.bytes / updates,
            "formula_bytes_per_step": counted.formula_bytes / updates,
            "compression_seconds": counted.compression_seconds / updates,
            "method": self.exchanges.compressor_name,
        }
