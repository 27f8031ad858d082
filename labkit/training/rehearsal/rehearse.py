"""The rehearsal: on every rank, before step 1, the task is tried as it will be used (issue 11).

A few samples go through the data set, the model in both modes, the loss, a pass backward, the held-out metric, and the
state is asked whether a checkpoint can hold it. Whatever goes wrong is one sentence (TaskFault). Everything is put back
afterwards (restore.py), so that the numbers of the run do not move in the last bit. Then the ranks compare what they
have built and seen: who built another task is named (fingerprint.py), and parameters that some passes leave out are
known before DDP and `fully_shard` wait for their gradients.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from labkit.experiment import Experiment
from labkit.experiment.fault import TaskFault, named
from labkit.parallel.cast import widen
from labkit.training.rehearsal import fingerprint, fits, hooks, leaves
from labkit.training.rehearsal.advice import backward_fault, describe, hint, samples_of, shape_of
from labkit.training.rehearsal.control_flow import ControlFlowProbe
from labkit.training.rehearsal.exactness import non_parity_modules
from labkit.training.rehearsal.ids import Ids
from labkit.training.rehearsal.loss_proof import prove_loss
from labkit.training.rehearsal.moving_state import MovingState
from labkit.training.rehearsal.same_loss import compare_losses, loss_of_first_samples
from labkit.training.runtime import Runtime
from labkit.training.sampling import BatchOrder, Indices
from labkit.workloads.base import Batch, Data, Task
from labkit.workloads.fetch import checked, fetch
from labkit.workloads.restore import Snapshot, restored
from labkit.workloads.seed import seed_generators

SAMPLES = 2
"""In a pass: one sample alone would let batch normalisation fail that never sees so few in the run."""
MORE_PASSES = 8
"""Passes over other samples where the way through a model may depend on what it sees."""
LOOK_S = 0.25
"""How long further samples of a data set of one's own are looked at (s)."""
MOST_LOOKED = 512
LARGE = 2**28
"""From this size on it is asked whether there is room for gradients of the whole model (bytes of its weights)."""
_KNOWN = ("labkit.workloads", "torch.nn.modules")
"""Models made of these alone take the same way whatever they see."""
_BUILT_IN = ("vision", "language", "driving")
"""Their metrics need no rehearsal."""


@dataclass
class Rehearsed:
    """What a rank has seen of its task."""

    notes: list[str] = field(default_factory=list)
    """For the run's warnings."""
    unused: list[str] = field(default_factory=list)
    """Parameters to be trained that some pass on some rank left without a gradient."""
    wanders: bool = False
    """The way through the model may depend on the samples, on chance or on the number of the pass, on some rank."""
    foreign: bool = True
    """Does the task, or a module of its model, come from somebody else than labkit?"""
    built: str = ""
    """Hash of what the rank has built: equal where two runs train the same task."""
    seconds: float = 0.0

    def event(self) -> dict[str, Any]:
        """The fields of the event `rehearsal`."""
        return {"seconds": round(self.seconds, 4), "unused": self.unused[:20], "built": self.built}

    @property
    def irregular(self) -> bool:
        """May a pass leave parameters without a gradient?"""
        return self.wanders or bool(self.unused)


def rehearse(
    experiment: Experiment, task: Task, runtime: Runtime, order: BatchOrder, phase: Callable[[str], None]
) -> Rehearsed:
    """Try the task on this rank and compare it with the others' (collective).

    The model lies on the device and in the number format of the run, whole. `phase` is called with what
    goes on, so that whoever hangs is named. TaskFault with one sentence if the task cannot be trained.
    """
    begun = time.perf_counter()
    rehearsed = Rehearsed(foreign=_is_foreign(experiment, task.model))
    seed = experiment.training.seed
    refused = fits.unfinished(task.model) or next(fits.misfits(experiment, task.model), None)
    refused = refused or hooks.lost_by(experiment, task.model)
    if refused:
        raise TaskFault(refused)
    with restored(task, task.model, task.train, task.test, device=runtime.device) as snapshot:
        phase("data")
        mine = fingerprint.Fingerprint.of(task, seed)
        rehearsed.built = mine.total
        seed_generators(seed)
        rehearsal = _Rehearsal(experiment, task, runtime, phase, snapshot, order, rehearsed.foreign)
        loss: float | None = None
        if rehearsal.fits:
            used = rehearsal.run(rehearsed)
        else:
            used = [frozenset(rehearsal.trained)]
            rehearsed.notes.append("the task was not tried before step 1: gradients of the whole model would not fit")
        phase("forward")
        rehearsed.notes += _proofs(experiment, task, runtime, rehearsed.foreign)
        if runtime.ranks > 1 and not runtime.isolated:
            if rehearsed.foreign and rehearsal.fits:
                loss = loss_of_first_samples(task, runtime, snapshot, seed)
                snapshot.undo()
            phase("checkpoint")  # the last of all phases: whoever is behind is the one that is waited for
            _compare(experiment, task, rehearsed, used, mine)
            if rehearsed.foreign:
                compare_losses(loss)
    phase("setup")
    if runtime.device.type == "cuda":  # the peak of the run is that of its steps
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(runtime.device)
    rehearsed.seconds = time.perf_counter() - begun
    return rehearsed


def _proofs(experiment: Experiment, task: Task, runtime: Runtime, foreign: bool) -> list[str]:
    """Reasons why ranks, or passes of one, differ from one process; TaskFault where the loss does not allow several."""
    ranks, passes = 1 if runtime.isolated else runtime.ranks, experiment.gradients.accumulation
    about_data = [str(note) for note in task.facts().get("notes", [])]
    notes = about_data + non_parity_modules(task.model, ranks, passes, task if foreign else None, runtime.place)
    if runtime.isolated or ranks * passes == 1:
        return notes
    proof = prove_loss(task, runtime.place)
    if proof.uneven is None:
        return notes + proof.notes
    if experiment.gradients.update.method == "synchronous":
        raise TaskFault(proof.uneven)
    return [*notes, *proof.notes, proof.uneven]


def _roomy(model: nn.Module, device: torch.device) -> bool:
    """Do gradients of the whole model, which a layout may never hold on one rank, fit beside it?"""
    size = sum(one.numel() * one.element_size() for one in model.parameters())
    if size < LARGE:
        return True
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] > 2 * size
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") > 2 * size


def _compare(
    experiment: Experiment, task: Task, rehearsed: Rehearsed, used: list[frozenset[str]], mine: fingerprint.Fingerprint
) -> None:
    """Compare with the other ranks; what holds on one of them holds for all."""
    rehearsed.notes += fingerprint.compare(mine, lambda: fingerprint.Fingerprint.of(task, experiment.training.seed))
    every: list[Any] = [None] * dist.get_world_size()
    if not rehearsed.irregular and not _may_wander(task.model):
        return  # the same on all ranks: the model is the same
    dist.all_gather_object(every, (rehearsed.wanders, used))
    rehearsed.wanders = any(wanders for wanders, _ in every)
    by_rank = [ways for _, ways in every]
    trained = {name for name, one in task.model.named_parameters() if one.requires_grad}
    rehearsed.unused = sorted(trained - frozenset.intersection(*(way for ways in by_rank for way in ways)))
    layout = experiment.layout
    # In the same pass: where all ranks leave out the same, nobody waits.
    sometimes = sorted({name for same in zip(*by_rank, strict=False) for way in same for name in way ^ same[0]})
    if sometimes:
        rehearsed.notes.append(
            "the way through the model depends on the samples of a pass, so ranks differ from one process"
        )
    if sometimes and layout.dp_shard > 1 and layout.zero_stage == 3:
        raise TaskFault(
            f"{sometimes[0]} is used by some ranks and not by others in the same pass, and ZeRO 3 would wait for ever "
            "for its gradient: set layout.zero_stage to 1 or 2, or use layout.dp_replicate"
        )


def _is_foreign(experiment: Experiment, model: nn.Module) -> bool:
    return experiment.workload.name not in _BUILT_IN or _may_wander(model)


def _may_wander(model: nn.Module) -> bool:
    """Is there a module whose code is not labkit's or torch's own?"""
    return any(not type(module).__module__.startswith(_KNOWN) for module in model.modules())


class _Rehearsal:
    """The passes of one rank."""

    def __init__(
        self,
        experiment: Experiment,
        task: Task,
        runtime: Runtime,
        phase: Callable[[str], None],
        snapshot: Snapshot,
        order: BatchOrder,
        foreign: bool,
    ) -> None:
        self.experiment, self.task, self.runtime = experiment, task, runtime
        self.phase, self.snapshot, self.foreign = phase, snapshot, foreign
        self.ids = Ids(task.model) if foreign else None
        self.fits = _roomy(task.model, runtime.device)
        """Whether gradients of the whole model fit next to it."""
        self.trained = {name: one for name, one in task.model.named_parameters() if one.requires_grad}
        share, shares = runtime.mesh.data_shard
        passes = experiment.gradients.accumulation
        self.passes: Callable[[int], list[Indices]] = lambda step: order.micro_batches(step, share, shares, passes)

    def run(self, rehearsed: Rehearsed) -> list[frozenset[str]]:
        """All of it; returns the names of the parameters that each pass used."""
        task, model = self.task, self.task.model
        wanders = ControlFlowProbe(self.snapshot.changed) if _may_wander(model) else None
        indices = self.passes(0)[0].tolist()[:SAMPLES] or [0]
        batch = checked(task.train, indices, "train")
        used = [self._train(batch, indices, wanders)]
        if rehearsed.foreign:
            used.append(self._train(batch, indices, wanders))  # what is kept from pass to pass
            rehearsed.notes += self._moving_state(batch, indices)
            self._evaluate()
            self._look_further()
        state = fits.unsaved(model.state_dict()) if self.experiment.training.checkpoint_every != 0 else None
        if state:
            raise TaskFault(state)
        try:
            json.dumps(task.facts())
        except Exception as error:
            raise TaskFault(f"the facts of the task cannot be written as JSON: {named(error)}") from error
        if wanders is not None:
            if wanders.differs_when_repeated and self.experiment.layout.activation_checkpointing != "none":
                raise TaskFault(
                    "the model counts its passes, or draws from numpy or random, so activations cannot be computed "
                    "again as they were: set layout.activation_checkpointing to none, or draw from torch"
                )
            if wanders.detected or len(used[0]) < len(self.trained):
                used += [self._train(*other, wanders) for other in self._others()]
            rehearsed.wanders = wanders.detected or len(set(used)) > 1
        rehearsed.unused = sorted(set(self.trained) - frozenset.intersection(*used))
        return used

    def _moving_state(self, batch: Batch, indices: list[int]) -> list[str]:
        """Return a note if a training pass changes what the optimizer does not train; TaskFault if that would be lost.

        The trained weights differ a little from those at the start: a teacher that equals them does not move.
        """
        moving, model = MovingState(self.task.model), self.task.model
        with torch.no_grad(), _alone(model):
            for parameter in self.trained.values():
                if parameter.is_floating_point() or parameter.is_complex():
                    parameter.mul_(1.01).add_(1e-3)
            model.train()
            self._output(batch, indices, "train")
        notes = moving.notes(self.experiment)
        self.snapshot.undo(generators=False)
        return notes

    def _others(self) -> Iterator[tuple[Batch, list[int]]]:
        """Further passes of different samples, each with other random numbers."""
        for number in range(MORE_PASSES):
            seed_generators(self.experiment.training.seed + 1 + number + MORE_PASSES * self.runtime.rank)
            chosen = self.passes(1 + number)[0].tolist()[: SAMPLES if number % 2 else 4 * SAMPLES]
            yield checked(self.task.train, chosen, "train"), chosen

    def _train(self, batch: Batch, indices: list[int], wanders: ControlFlowProbe | None = None) -> frozenset[str]:
        """One pass forward and backward; the names of the parameters that got a gradient."""
        model = self.task.model
        for one in self.trained.values():
            one.grad = None
        model.train()
        with _alone(model):
            self.phase("forward")
            with wanders or _nothing():
                output = self._output(batch, indices, "train")
                loss = self._loss(output, batch, indices, "train")
            if not loss.requires_grad:
                raise TaskFault(
                    "the loss does not depend on any parameter that is trained: a detach(), no_grad() or numpy stands "
                    "between the model and the loss"
                )
            self._look_at_graph(batch, output, loss)
            self.phase("backward")
            try:
                loss.backward()
            except Exception as error:
                raise TaskFault(backward_fault(self.task, error)) from error
        gradients = {name: one.grad for name, one in self.trained.items() if one.grad is not None}
        refused = fits.sparse_gradients(
            self.experiment, [name for name, gradient in gradients.items() if gradient.layout is not torch.strided]
        )
        if refused:
            raise TaskFault(refused)
        for one in self.trained.values():
            one.grad = None
        if not gradients:
            raise TaskFault("no parameter gets a gradient from the loss: the model's output does not depend on any")
        return frozenset(gradients)

    def _look_at_graph(self, batch: Batch, output: Tensor, loss: Tensor) -> None:
        """What the loss depends on must be what is trained."""
        if not self.foreign:
            return
        for name, value in batch.items():
            if value.requires_grad:
                remedy = f"give it without ({name}.detach())"
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
            ids = self.ids.checked(x, indices, what) if self.ids is not None else _nothing()
            with self.runtime.accelerator.autocast(), ids:
                output = model(x)
        except TaskFault:
            raise
        except Exception as error:
            raise TaskFault(f"{place} (x is {shape_of(batch['x'])}): {named(error)}{hint(batch, model)}") from error
        if not isinstance(output, Tensor):
            raise TaskFault(
                f"in {mode} the model returns {describe(output)}: it must return one tensor, the scores that loss and "
                "metric are computed from"
            )
        return output

    def _loss(self, output: Tensor, batch: Batch, indices: list[int], what: str) -> Tensor:
        try:
            loss: Any = self.task.loss(widen(output), self.runtime.place(_fresh(batch)))
        except Exception as error:
            targets = ", ".join(f"{name} is {shape_of(value)}" for name, value in batch.items() if name != "x")
            given = f"the output is {describe(output)}" + (f", {targets}" if targets else "")
            raise TaskFault(f"the loss fails on {samples_of(indices, what)} ({given}): {named(error)}") from error
        if not isinstance(loss, Tensor):
            raise TaskFault(f"the loss is {describe(loss)}, it must be a tensor with one number")
        if loss.dim():
            raise TaskFault(
                f"the loss has the shape {list(loss.shape)}, it must be one number: the mean over the samples"
            )
        if loss.is_complex() or not loss.is_floating_point():
            raise TaskFault(
                f"the loss is a number of {str(loss.dtype).removeprefix('torch.')}, it must be a real number"
            )
        return loss

    @torch.no_grad()
    def _evaluate(self) -> None:
        """The held-out metric of a few samples, through to what is shown."""
        if self.experiment.training.evaluate_every == 0:
            return
        task = self.task
        indices = list(range(min(SAMPLES, len(task.test))))
        self.phase("evaluation")
        batch = checked(task.test, indices, "test")
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
            raise TaskFault(f"the held-out metric fails on {place}: {named(error)}") from error
        lacking = [name for name in ("count",) if name not in numbers]
        lacking += [name for name in ("loss", task.metric.key) if name not in metrics]
        if lacking:
            raise TaskFault(f"the held-out sums or metrics lack {' and '.join(lacking)}")

    def _look_further(self) -> None:
        """Fetch samples of a data set of one's own one by one for a while: odd ones are named before the first step."""
        self.phase("data")
        deadline = time.perf_counter() + LOOK_S
        for what, data in (("train", self.task.train), ("test", self.task.test)):
            assert self.ids is not None
            self.ids.check_all(data, what)
            if self.experiment.workload.name not in _BUILT_IN:
                _look(data, what, deadline, self.ids)


def _look(data: Data, what: str, deadline: float, ids: Ids) -> None:
    first: dict[str, Any] = {}
    count = min(len(data), MOST_LOOKED)
    for index in sorted({int(each) for each in np.linspace(0, len(data) - 1, count)}):
        if time.perf_counter() > deadline:
            return
        batch = checked(data, [index], what)
        ids.check_samples(batch["x"], index, what)
        for name, value in batch.items():
            first.setdefault(name, (index, value))
            other, before = first[name]
            if value.shape[1:] != before.shape[1:]:
                fetch(data, [other, index], what)  # a data set of one's own may pad what it puts together


# -- small things -----------------------------------------------------------------------------------------------------


def _fresh(batch: Batch) -> Batch:
    """Return a copy of a batch: a model or a loss may write to what it is given, as in training."""
    return {name: value.detach().clone() for name, value in batch.items()}


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _alone(model: nn.Module) -> Iterator[None]:
    """Layers that would talk to other ranks are left in evaluation: a rank that fails must not keep others waiting."""
    talking = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    modes = [module.training for module in talking]
    for module in talking:
        module.training = False
    try:
        yield
    finally:
        for module, mode in zip(talking, modes, strict=True):
            module.training = mode
