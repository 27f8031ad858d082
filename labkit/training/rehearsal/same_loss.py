"""Do all ranks compute the same loss for the same samples? What differs then is no weight, buffer or sample.

A plain attribute, a factor in the loss, a buffer of the loss's module: drawn anew by each rank, they make ranks train
different models, and a fingerprint of weights, buffers and samples does not see them (issue 11).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

from labkit.experiment.fault import TaskFault
from labkit.parallel.cast import widen
from labkit.training.rehearsal.fingerprint import SEEDED
from labkit.training.runtime import Runtime
from labkit.workloads.base import Task
from labkit.workloads.restore import Snapshot
from labkit.workloads.seed import seed_generators

SAMPLES = 16
TOLERANCE = 1e-3
"""Relative difference of losses that counts as the same: far above the rounding of 16 bits on other kernels."""


def loss_of_first_samples(task: Task, runtime: Runtime, snapshot: Snapshot, seed: int) -> float | None:
    """Return the loss of the first samples in a training pass; None if it is not the same twice, or cannot be computed.

    Every pass begins with the state in `snapshot` and with all generators seeded, so only what is drawn from others, or
    kept elsewhere, can differ.
    """
    losses = []
    for _ in range(2):
        snapshot.undo()
        seed_generators(seed)
        if runtime.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        task.model.train()
        try:
            batch = runtime.place(task.train.__getitems__(list(range(min(SAMPLES, len(task.train))))))
            with torch.no_grad(), runtime.accelerator.autocast():
                output = task.model(batch["x"].clone())
            losses.append(float(task.loss(widen(output), batch)))
        except Exception:  # a person's own code: the rehearsal says what it raises
            return None
    return losses[0] if losses[0] == losses[1] and math.isfinite(losses[0]) else None


def compare_losses(loss: float | None) -> None:
    """Compare the loss of the same samples with all other ranks (collective); raise TaskFault if they differ."""
    losses: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(losses, loss)
    if any(each is None for each in losses):
        return  # random, or not computable everywhere: notes and refusals say so
    for rank, each in enumerate(losses):
        if abs(each - losses[0]) > TOLERANCE * max(abs(each), abs(losses[0]), 1e-12):
            raise TaskFault(
                f"the loss of the same samples is {losses[0]:.6g} on rank 0 and {each:.6g} on rank {rank}, although "
                f"weights, buffers and samples are equal: something else in the model or the loss differs; {SEEDED}"
            )
