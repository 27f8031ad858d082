"""Check that all ranks compute the same loss for the same samples: weights, buffers and samples are already compared.

If each rank draws its own value of a plain attribute, a factor in the loss or a buffer of the loss's module, the ranks
train different models, which a fingerprint of weights, buffers and samples does not reveal (issue 11).
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
"""Relative difference up to which losses count as equal: far above rounding differences of kernels in 16 bits."""


def loss_of_first_samples(task: Task, runtime: Runtime, snapshot: Snapshot, seed: int) -> float | None:
    """Return the loss of the first samples in a training pass; None if it is not repeatable or cannot be computed.

    Every pass begins with the state in `snapshot` and with all generators seeded, so only values that come from other
    generators, or state that is kept elsewhere, can differ.
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
        except Exception:  # the user's own code: the rehearsal reports what it raises
            return None
    return losses[0] if losses[0] == losses[1] and math.isfinite(losses[0]) else None


def compare_losses(loss: float | None) -> None:
    """Compare the loss of the same samples with all other ranks (collective); raise TaskFault if they differ."""
    losses: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(losses, loss)
    if any(rank_loss is None for rank_loss in losses):
        return  # random, or not computable on some rank: notes and errors report that
    for rank, rank_loss in enumerate(losses):
        if abs(rank_loss - losses[0]) > TOLERANCE * max(abs(rank_loss), abs(losses[0]), 1e-12):
            raise TaskFault(
                f"the loss of the same samples is {losses[0]:.6g} on rank 0 and {rank_loss:.6g} on rank {rank}, "
                "although weights, buffers and samples are equal: something else in the model or the loss differs; "
                f"{SEEDED}"
            )
