"""The passes of a rehearsal: a few samples through data set, model, loss, backward pass and held-out metric."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from labkit.experiment import Experiment
from labkit.experiment.fault import TaskFault, describe_error
from labkit.parallel.cast import widen
from labkit.parallel.transfer import has_room
from labkit.training.rehearsal import fits, leaves
from labkit.training.rehearsal.advice import backward_fault, describe, hint, samples_of, shape_of
from labkit.training.rehearsal.control_flow import ControlFlowProbe
from labkit.training.rehearsal.freed import gradients_freed
from labkit.training.rehearsal.ids import Ids
from labkit.training.rehearsal.moving_state import MovingState
from labkit.training.rehearsal.result import RehearsalResult
from labkit.training.rehearsal.unseeded import ClockWatch
from labkit.training.runtime import Runtime
from labkit.training.sampling import BatchOrder, Indices
from labkit.workloads.base import Batch, Data, Task
from labkit.workloads.fetch import fetch, fetch_checked
from labkit.workloads.mapped import LARGE_MODEL, is_mapped
from labkit.workloads.restore import Snapshot
from labkit.workloads.seed import seed_generators

SAMPLES = 2
"""Number of samples in a pass, unless passes of the run have fewer."""
MORE_PASSES = 8
"""Number of passes over other samples if the control flow of the model may depend on its input."""
SCAN_S = 0.25
"""Time limit for reading further samples of a user's own data set (s)."""
MAX_SCANNED = 512
"""Maximum number of these samples."""
_STATIC = ("labkit.workloads", "torch.nn.modules")
"""Packages whose modules have the same control flow for every input."""
BUILT_IN = ("vision", "language", "driving")
"""Workloads whose metrics need no rehearsal."""


class RehearsalPasses:
    """Forward, backward and evaluation passes of one rank."""

    def __init__(
        self,
        experiment: Experiment,
        task: Task,
        runtime: Runtime,
        phase: Callable[[str], None],
        snapshot: Snapshot,
        order: BatchOrder,
        user_code: bool,
    ) -> None:
        self.experiment, self.task, self.runtime = experiment, task, runtime
        self.phase, self.snapshot, self.user_code = phase, snapshot, user_code
        self.ids = Ids(task.model) if user_code else None
        self.fits = _gradients_fit(task.model, runtime.device)
        """Whether gradients of the whole model fit in memory."""
        self.trained = {name: parameter for name, parameter in task.model.named_parameters() if parameter.requires_grad}
        share, shares = runtime.mesh.data_shard
        passes = experiment.gradients.accumulation
        self.passes: Callable[[int], list[Indices]] = lambda step: order.micro_batches(step, share, shares, passes)

    def run(self, rehearsed: RehearsalResult) -> list[frozenset[str]]:
        """Run all passes, fill in `rehearsed`, and return the names of the parameters that each training pass used."""
        task, model = self.task, self.task.model
        probe = ControlFlowProbe(self.snapshot.changed) if may_be_dynamic(model) else None
        indices = self._first_indices()
        batch = fetch_checked(task.train, indices, "train")
        used = [self._train(batch, indices, probe)]
        if rehearsed.user_code:
            used.append(self._train(batch, indices, probe))  # again, because state may be kept from pass to pass
            self._train_smallest(len(indices))
            with (watch := ClockWatch()).watching():
                rehearsed.notes += self._moving_state(batch, indices)
                self._evaluate()
            rehearsed.notes += watch.notes()
            self._scan_data()
        problem = fits.unsaved(model.state_dict()) if self.experiment.training.checkpoint_every != 0 else None
        if problem:
            raise TaskFault(problem)
        try:
            json.dumps(task.facts())
        except Exception as error:
            raise TaskFault(f"the facts of the task cannot be stored as JSON: {describe_error(error)}") from error
        if probe is not None:
            if probe.differs_when_repeated and self.experiment.layout.activation_checkpointing != "none":
                raise TaskFault(
                    "the model counts its passes, or draws from numpy or random, so recomputed activations would "
                    "differ: set layout.activation_checkpointing to none, or draw random numbers from torch"
                )
            if probe.detected or len(used[0]) < len(self.trained):
                used += [self._train(*further, probe) for further in self._further_batches()]
            rehearsed.dynamic = probe.detected or len(set(used)) > 1
        rehearsed.unused = sorted(set(self.trained) - frozenset.intersection(*used))
        return used

    def _first_indices(self) -> list[int]:
        """Return the indices of the samples of the first pass."""
        return self.passes(0)[0].tolist()[:SAMPLES] or [0]

    def forward(self) -> int:
        """Run one forward pass of the whole model in training mode, and return the number of its samples."""
        indices = self._first_indices()
        batch = fetch_checked(self.task.train, indices, "train")
        self.task.model.train()
        with _alone(self.task.model):
            self._output(batch, indices, "train")
        return len(indices)

    def shapes(self) -> int:
        """Do the same on the device `meta`, which computes shapes without numbers, for a model that no GPU can hold."""
        indices, model = self._first_indices(), self.task.model
        x = self.runtime.place(fetch_checked(self.task.train, indices, "train"))["x"]
        tensors = {name: tensor.to("meta") for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        functional_call(model.train(), tensors, (x.to("meta"),))
        return len(indices)

    def _train_smallest(self, tried: int) -> None:
        """Try a pass of as few samples as some have in the run, if that is fewer than `tried`.

        Batch normalisation fails with a single sample, and it may come in a later pass than the first one.
        """
        layout, training = self.experiment.layout, self.experiment.training
        sizes = [len(indices) // layout.microbatches_per_pass for indices in self.passes(0)]
        least = max(1, min(sizes))
        if least >= tried:
            return
        indices = self.passes(0)[0].tolist()[:least]
        try:
            self._train(fetch_checked(self.task.train, indices, "train"), indices)
        except TaskFault as fault:
            pieces = layout.data_parallel * self.experiment.gradients.accumulation * layout.microbatches_per_pass
            raise TaskFault(
                f"{fault}; with {tried} samples it works, but passes of this run have only {least}: set "
                f"training.global_batch to {tried * pieces} or more (now {training.global_batch}), or use fewer passes"
            ) from fault

    def _moving_state(self, batch: Batch, indices: list[int]) -> list[str]:
        """Return a note if a training pass changes untrained state; raise TaskFault if that change would be lost.

        If the trained weights can be restored, they are perturbed a little first, because a teacher that equals them
        would not change.
        """
        moving, model = MovingState(self.task.model), self.task.model
        with torch.no_grad(), _alone(model):
            for parameter in self.trained.values() if self.snapshot.has_weights else ():
                if parameter.is_floating_point() or parameter.is_complex():
                    parameter.mul_(1.01).add_(1e-3)
            model.train()
            self._output(batch, indices, "train")
        notes = moving.notes(self.experiment, self.snapshot.counter())
        self.snapshot.undo(generators=False)
        return notes

    def _further_batches(self) -> Iterator[tuple[Batch, list[int]]]:
        """Yield batches of further samples with their indices; before each, the generators are seeded differently."""
        for number in range(MORE_PASSES):
            seed_generators(self.experiment.training.seed + 1 + number + MORE_PASSES * self.runtime.rank)
            indices = self.passes(1 + number)[0].tolist()[: SAMPLES if number % 2 else 4 * SAMPLES]
            yield fetch_checked(self.task.train, indices, "train"), indices

    def _train(self, batch: Batch, indices: list[int], probe: ControlFlowProbe | None = None) -> frozenset[str]:
        """Run one forward and backward pass; return the names of the parameters that got a gradient."""
        model = self.task.model
        for parameter in self.trained.values():
            parameter.grad = None
        model.train()
        with _alone(model):
            self.phase("forward")
            with probe or nullcontext():
                output = self._output(batch, indices, "train")
                loss = self._loss(output, batch, indices, "train")
            if not loss.requires_grad:
                raise TaskFault(
                    "the loss does not depend on any parameter that is trained: there is a detach(), no_grad() or "
                    "numpy call between the model and the loss"
                )
            self._check_graph(batch, output, loss)
            self.phase("backward")
            try:
                with gradients_freed(self.trained) as gradients:
                    loss.backward()
            except Exception as error:
                raise TaskFault(backward_fault(self.task, error)) from error
        problem = fits.sparse_gradients(
            self.experiment, [name for name, layout in gradients.items() if layout is not torch.strided]
        )
        if problem:
            raise TaskFault(problem)
        if not gradients:
            raise TaskFault("no parameter gets a gradient from the loss: the model's output does not depend on any")
        return frozenset(gradients)

    def _check_graph(self, batch: Batch, output: Tensor, loss: Tensor) -> None:
        """Raise TaskFault if the loss depends on tensors that are not trained, or reads parameters it cannot reach."""
        if not self.user_code:
            return
        for name, value in batch.items():
            if value.requires_grad:
                remedy = f"detach it ({name}.detach())"
                raise TaskFault(f"{name} of train requires a gradient, which no optimizer would use: {remedy}")
        fault = leaves.untrained_leaf(self.task, loss) or leaves.parameter_in_loss(
            self.experiment, self.task, output, loss
        )
        if fault:
            raise TaskFault(fault)

    def _output(self, batch: Batch, indices: list[int], what: str) -> Tensor:
        model, mode = self.task.model, "training" if self.task.model.training else "evaluation"
        place = f"the model fails in {mode} on {samples_of(indices, what)}"
        try:
            x = self.runtime.place(_fresh(batch))["x"]
            ids = self.ids.checked(x, indices, what) if self.ids is not None else nullcontext()
            with self.runtime.accelerator.autocast(), ids:
                output = model(x)
        except TaskFault:
            raise
        except Exception as error:
            raise TaskFault(
                f"{place} (x is {shape_of(batch['x'])}): {describe_error(error)}{hint(batch, model)}"
            ) from error
        if not isinstance(output, Tensor):
            raise TaskFault(
                f"in {mode} the model returns {describe(output)}: it must return one tensor, from which loss and "
                "metric are computed"
            )
        return output

    def _loss(self, output: Tensor, batch: Batch, indices: list[int], what: str) -> Tensor:
        try:
            loss: Any = self.task.loss(widen(output), self.runtime.place(_fresh(batch)))
        except Exception as error:
            targets = ", ".join(f"{name} is {shape_of(value)}" for name, value in batch.items() if name != "x")
            inputs = f"the output is {describe(output)}" + (f", {targets}" if targets else "")
            raise TaskFault(
                f"the loss fails on {samples_of(indices, what)} ({inputs}): {describe_error(error)}"
            ) from error
        if not isinstance(loss, Tensor):
            raise TaskFault(f"the loss is {describe(loss)}; it must be a tensor with one number")
        if loss.dim():
            raise TaskFault(
                f"the loss has the shape {list(loss.shape)}; it must be one number, the mean over the samples"
            )
        if loss.is_complex() or not loss.is_floating_point():
            raise TaskFault(
                f"the loss has dtype {str(loss.dtype).removeprefix('torch.')}; it must be a real floating-point number"
            )
        return loss

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Compute the held-out metrics of a few samples as the run will."""
        if self.experiment.training.evaluate_every == 0:
            return
        task = self.task
        indices = list(range(min(SAMPLES, len(task.test))))
        self.phase("evaluation")
        batch = fetch_checked(task.test, indices, "test")
        task.model.eval()
        with _alone(task.model):
            output = self._output(batch, indices, "test")
        try:
            sums = task.evaluate(widen(output), self.runtime.place(_fresh(batch)))
            numbers = {name: float(value) for name, value in sums.items()}
            metrics = task.metrics(numbers)
        except TaskFault:
            raise
        except Exception as error:
            place = f"{samples_of(indices, 'test')} (the output is {describe(output)})"
            raise TaskFault(f"the held-out metric fails on {place}: {describe_error(error)}") from error
        missing = [name for name in ("count",) if name not in numbers]
        missing += [name for name in ("loss", task.metric.key) if name not in metrics]
        if missing:
            raise TaskFault(f"the held-out sums or metrics lack {' and '.join(missing)}")

    def _scan_data(self) -> None:
        """Read samples of a user's own data set one by one for `SCAN_S`, to report bad ones before the first step."""
        self.phase("data")
        deadline = time.perf_counter() + SCAN_S
        for what, data in (("train", self.task.train), ("test", self.task.test)):
            assert self.ids is not None
            self.ids.check_all(data, what)
            if self.experiment.workload.name not in BUILT_IN:
                _scan(data, what, deadline, self.ids)


def _scan(data: Data, what: str, deadline: float, ids: Ids) -> None:
    first: dict[str, Any] = {}
    count = min(len(data), MAX_SCANNED)
    for index in sorted({int(position) for position in np.linspace(0, len(data) - 1, count)}):
        if time.perf_counter() > deadline:
            return
        batch = fetch_checked(data, [index], what)
        ids.check_samples(batch["x"], index, what)
        for name, value in batch.items():
            first.setdefault(name, (index, value))
            first_index, first_value = first[name]
            if value.shape[1:] != first_value.shape[1:]:
                fetch(data, [first_index, index], what)  # a user's data set may pad the samples of a batch


# -- helpers ----------------------------------------------------------------------------------------------------------


def _fresh(batch: Batch) -> Batch:
    """Return a copy of a batch, because a model or a loss may write to its input."""
    return {name: value.detach().clone() for name, value in batch.items()}


@contextmanager
def _alone(model: nn.Module) -> Iterator[None]:
    """Keep layers that communicate in evaluation mode inside the context: a rank that fails must not block others."""
    communicating = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    modes = [module.training for module in communicating]
    for module in communicating:
        module.training = False
    try:
        yield
    finally:
        for module, mode in zip(communicating, modes, strict=True):
            module.training = mode


def _gradients_fit(model: nn.Module, device: torch.device) -> bool:
    """Return whether gradients of the whole model fit in memory; the layout may never hold them all on one rank."""
    size = sum(parameter.nbytes for parameter in model.parameters())
    if size < LARGE_MODEL or any(map(is_mapped, model.parameters())):
        return True  # gradients of a mapped model are freed one by one (freed.py)
    return has_room(2 * size, device)


def may_be_dynamic(model: nn.Module) -> bool:
    """Return whether a module of the model is neither labkit's nor torch's own."""
    return any(not type(module).__module__.startswith(_STATIC) for module in model.modules())
