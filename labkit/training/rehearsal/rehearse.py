"""The rehearsal: before step 1, every rank tries the task in the way the run will use it (issue 11).

A few samples go through the data set, the model in both modes, the loss, a backward pass and the held-out metric, and
the state is checked for values that a checkpoint cannot store. Every failure is reported in one sentence (TaskFault).
Everything is restored afterwards (restore.py), so that the results of the run stay the same bit for bit. Then the
ranks compare what they have built and observed: a rank that built a different task is named (fingerprint.py), and
parameters that some passes do not use are identified before DDP and `fully_shard` wait for their gradients.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from labkit.experiment import Experiment
from labkit.experiment.fault import TaskFault
from labkit.experiment.update_rule import update_rule
from labkit.parallel import transfer
from labkit.training.rehearsal import fingerprint, fits, hooks
from labkit.training.rehearsal.exactness import non_parity_modules
from labkit.training.rehearsal.loss_proof import prove_loss
from labkit.training.rehearsal.model_flops import count_model_flops
from labkit.training.rehearsal.passes import BUILT_IN, RehearsalPasses, may_be_dynamic
from labkit.training.rehearsal.result import RehearsalResult
from labkit.training.rehearsal.same_loss import compare_losses, loss_of_first_samples
from labkit.training.runtime import Runtime
from labkit.training.sampling import BatchOrder
from labkit.workloads.base import Task
from labkit.workloads.restore import Snapshot, restored
from labkit.workloads.seed import seed_generators


def rehearse(
    experiment: Experiment, task: Task, runtime: Runtime, order: BatchOrder, phase: Callable[[str], None]
) -> RehearsalResult:
    """Try the task on this rank and compare it with that of the other ranks (collective).

    The whole model must be in the dtype of the run; it is held on the device of the run meanwhile if it fits there.
    `phase` is called with the name of each phase, so that a rank that hangs can be reported. Raise TaskFault with one
    sentence if the task cannot be trained.
    """
    started = time.perf_counter()
    rehearsed = RehearsalResult(user_code=_has_user_code(experiment, task.model))
    seed = experiment.training.seed
    problem = fits.unfinished(task.model) or next(fits.misfits(experiment, task.model), None)
    problem = problem or hooks.lost_by(experiment, task.model)
    if problem:
        raise TaskFault(problem)
    fits_device = _fits_device(task.model, runtime)
    if not fits_device:
        runtime = runtime.on_host()
    with (
        transfer.on_device(task.model, runtime.device),
        restored(task, task.model, task.train, task.test, device=runtime.device) as snapshot,
    ):
        phase("data")
        mine = fingerprint.Fingerprint.of(task, seed)
        rehearsed.task_hash = mine.total
        seed_generators(seed)
        rehearsal = RehearsalPasses(experiment, task, runtime, phase, snapshot, order, rehearsed.user_code)
        loss: float | None = None
        tried = fits_device and rehearsal.fits
        if tried:
            used = rehearsal.run(rehearsed)
        else:
            used = [frozenset(rehearsal.trained)]
            what = "its gradients would not fit in memory" if fits_device else "the whole model does not fit on one GPU"
            rehearsed.notes.append(f"the task was not tried before step 1: {what}")
        if runtime.rank == 0:
            rehearsed.model_flops, reason = count_model_flops(rehearsal.forward if fits_device else rehearsal.shapes)
            rehearsed.notes += [reason] if reason else []
            snapshot.undo()
        phase("forward")
        if fits_device:
            rehearsed.notes += _proofs(experiment, task, runtime, rehearsed.user_code)
        if runtime.ranks > 1 and not runtime.isolated:
            if rehearsed.user_code and tried:
                loss = loss_of_first_samples(task, runtime, snapshot, seed)
                snapshot.undo()
            phase("checkpoint")  # the last phase in the order: a rank that is behind is the one the others wait for
            _compare(experiment, task, rehearsed, used, mine)
            if rehearsed.user_code:
                compare_losses(loss)
        rehearsed.notes += _lost(task.model, snapshot)
    phase("setup")
    if runtime.device.type == "cuda":  # the peak memory of the run is that of its steps
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(runtime.device)
    rehearsed.seconds = time.perf_counter() - started
    return rehearsed


def _fits_device(model: nn.Module, runtime: Runtime) -> bool:
    """Return whether every rank can hold the whole model on its device (collective if ranks shard it)."""
    if not runtime.is_sharded or runtime.device.type == "cpu":
        return True
    sharing = -(-runtime.ranks // torch.cuda.device_count())
    fit = torch.tensor(float(transfer.fits(model, runtime.device, sharing)), device=runtime.device)
    dist.all_reduce(fit, dist.ReduceOp.MIN)
    return bool(fit)


def _lost(model: nn.Module, snapshot: Snapshot) -> list[str]:
    """Return a sentence if passes have changed tensors of a large model, of which no copies were kept."""
    tensors = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    names = [tensors[id(tensor)] for tensor in snapshot.lost() if id(tensor) in tensors]
    if not names:
        return []
    return [
        f"{names[0]} is changed in the forward pass, and the model is too large to be restored after the rehearsal, so "
        "training begins with the changed values"
    ]


def _proofs(experiment: Experiment, task: Task, runtime: Runtime, user_code: bool) -> list[str]:
    """Return why ranks or passes differ from one process; raise TaskFault if the loss does not allow several."""
    ranks, passes = 1 if runtime.isolated else runtime.ranks, experiment.gradients.accumulation
    data_notes = [str(note) for note in task.facts().get("notes", [])]
    notes = data_notes + non_parity_modules(task.model, ranks, passes, task if user_code else None, runtime.place)
    if runtime.isolated or ranks * passes == 1:
        return notes
    proof = prove_loss(task, runtime.place)
    if proof.violation is None:
        return notes + proof.notes
    if update_rule(experiment).is_synchronous:
        raise TaskFault(proof.violation)
    return [*notes, *proof.notes, proof.violation]


def _compare(
    experiment: Experiment,
    task: Task,
    rehearsed: RehearsalResult,
    used: list[frozenset[str]],
    mine: fingerprint.Fingerprint,
) -> None:
    """Compare with the other ranks, and add to `rehearsed` what applies to any of them."""
    rehearsed.notes += fingerprint.compare(mine, lambda: fingerprint.Fingerprint.of(task, experiment.training.seed))
    gathered: list[Any] = [None] * dist.get_world_size()
    if not rehearsed.irregular and not may_be_dynamic(task.model):
        return  # the same decision on all ranks, because the model is the same
    dist.all_gather_object(gathered, (rehearsed.dynamic, used))
    rehearsed.dynamic = any(dynamic for dynamic, _ in gathered)
    by_rank = [passes for _, passes in gathered]
    trained = {name for name, parameter in task.model.named_parameters() if parameter.requires_grad}
    rehearsed.unused = sorted(trained - frozenset.intersection(*(names for passes in by_rank for names in passes)))
    layout = experiment.layout
    # Pass by pass: if all ranks leave out the same parameters, no rank waits.
    sometimes = sorted({name for same in zip(*by_rank, strict=False) for names in same for name in names ^ same[0]})
    if sometimes:
        rehearsed.notes.append(
            "the control flow of the model depends on the samples of a pass, so ranks differ from one process"
        )
    if sometimes and layout.dp_shard > 1 and layout.zero_stage == 3:
        raise TaskFault(
            f"{sometimes[0]} is used by some ranks and not by others in the same pass, so ZeRO 3 would wait forever "
            "for its gradient: set layout.zero_stage to 1 or 2, or use layout.dp_replicate"
        )


def _has_user_code(experiment: Experiment, model: nn.Module) -> bool:
    return experiment.workload.name not in BUILT_IN or may_be_dynamic(model)
