"""Held-out metrics: every rank takes a part of the data, the sums are added up, so that the result is exact."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from labkit.training.runtime import Runtime
from labkit.workloads.base import Task

BATCH = 256
Model = Any
"""A ReplicatedModel or a ParallelModel."""


def evaluate(task: Task, model: Model, runtime: Runtime, alive: Callable[[], None]) -> dict[str, float]:
    """Sums over the whole held-out set, equal on all ranks. `alive` is called before every batch."""
    index, shares = runtime.mesh.samples
    mine = np.array_split(np.arange(len(task.test)), shares)[index]
    # Ranks that work together on a sample must all run, and as often: every share has as many batches as the longest.
    longest = math.ceil(len(task.test) / shares)
    rounds = max(1, math.ceil(longest / BATCH))
    totals: dict[str, float] = {}
    model.train(False)
    with torch.no_grad():
        for turn in range(rounds):
            alive()
            indices = mine[turn * BATCH : (turn + 1) * BATCH]
            empty = not len(indices)
            batch = runtime.place(task.test.__getitems__([0] if empty else indices.tolist()))
            output = model.output(batch["x"])
            if output is None:
                continue
            counts = model.reports and not empty
            for name, value in task.evaluate(output, batch).items():
                totals[name] = totals.get(name, 0.0) + (float(value) if counts else 0.0)
    model.train(True)
    return runtime.add_up(totals)


class _Whole(nn.Module):
    """A spread model as a module that can be called, all ranks together."""

    def __init__(self, model: Model, runtime: Runtime, alive: Callable[[], None]) -> None:
        super().__init__()
        self._model, self._runtime, self._alive = [model], runtime, alive
        self.like = nn.Parameter(torch.zeros((), dtype=runtime.dtype, device=runtime.device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        self._alive()
        return self._runtime.from_last_stage(self._model[0].output(x))


def drive(task: Task, model: Model, runtime: Runtime, seed: int, alive: Callable[[], None]) -> dict[str, float]:
    """Sums of the workload's test beyond the held-out data, if it has one; equal on all ranks.

    `alive` is called whenever the model is asked. Replicas share the work; ranks of a spread model all do the same.
    """
    spread = runtime.spread
    model.train(False)
    with torch.no_grad():
        whole = _Whole(model, runtime, alive)
        sums = task.closed_loop(whole, 0 if spread else runtime.rank, 1 if spread else runtime.ranks, seed)
    model.train(True)
    if spread:
        return sums
    return runtime.add_up(sums) if sums else {}
