"""Held-out metrics: every rank takes a part of the data, the sums are added up, so that the result is exact."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from labkit.training.runtime import Runtime
from labkit.workloads.base import Task

BATCH = 256


def evaluate(task: Task, model: nn.Module, runtime: Runtime, alive: Callable[[], None]) -> dict[str, float]:
    """Sums over the whole held-out set, equal on all ranks. `alive` is called before every batch."""
    mine = np.array_split(np.arange(len(task.test)), runtime.ranks)[runtime.rank]
    totals: dict[str, float] = {}
    model.eval()
    with torch.inference_mode():
        # At least one batch on every rank, even an empty one: all ranks must name the same sums.
        for begin in range(0, max(1, len(mine)), BATCH):
            alive()
            indices = mine[begin : begin + BATCH] if len(mine) else np.zeros(1, dtype=int)
            batch = runtime.place(task.test.__getitems__(indices.tolist()))
            for name, value in task.evaluate(model(batch["x"]), batch).items():
                totals[name] = totals.get(name, 0.0) + (float(value) if len(mine) else 0.0)
    model.train()
    return runtime.add_up(totals)


def drive(task: Task, model: nn.Module, runtime: Runtime, seed: int, alive: Callable[[], None]) -> dict[str, float]:
    """Sums of the workload's test beyond the held-out data, if it has one; equal on all ranks.

    `alive` is called whenever the model is asked.
    """
    model.eval()
    watched = model.register_forward_pre_hook(lambda module, inputs: alive())
    try:
        with torch.inference_mode():
            sums = task.closed_loop(model, runtime.rank, runtime.ranks, seed)
    finally:
        watched.remove()
    model.train()
    return runtime.add_up(sums) if sums else {}
