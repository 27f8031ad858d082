"""Held-out metrics: every rank takes a part of the data, the sums are added up, so that the result is exact."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from labkit.experiment import Experiment
from labkit.parallel.model import ParallelModel
from labkit.parallel.replicate import ReplicatedModel
from labkit.training.probes.layers import LayerProbe
from labkit.training.runtime import Runtime
from labkit.workloads.base import Task

BATCH = 256
"""Held-out samples that one rank evaluates at once, at most."""
Model = ReplicatedModel | ParallelModel


def batch_size(experiment: Experiment, device: torch.device) -> int:
    """Return how many held-out samples one rank evaluates at once.

    On a GPU it is never more than a training pass has: what fits in training must not run out of memory afterwards
    (a vocabulary of 32,000 and a context of 1,024 make 33 GB of scores for 256 samples).
    """
    if device.type != "cuda":
        return BATCH
    shares = experiment.layout.data_parallel * experiment.gradients.accumulation
    return min(BATCH, math.ceil(experiment.training.global_batch / shares))


def evaluate(
    task: Task, model: Model, runtime: Runtime, alive: Callable[[], None], size: int, watch: LayerProbe | None = None
) -> dict[str, float]:
    """Return sums over the whole held-out set, equal on all ranks, computed over `size` samples at once.

    `alive` is called before every batch; `watch` sees the layers of this rank in the first one.
    """
    index, shares = runtime.mesh.data_shard
    mine = np.array_split(np.arange(len(task.test)), shares)[index]
    # Ranks that work together on a sample must all run, and as often: every share has as many batches as the longest.
    longest = math.ceil(len(task.test) / shares)
    rounds = max(1, math.ceil(longest / size))
    totals: dict[str, float] = {}
    model.train(False)
    loss_module = getattr(task, "loss_module", None)
    if isinstance(loss_module, nn.Module):  # its own state must not move either
        loss_module.eval()
    with torch.no_grad():
        for turn in range(rounds):
            alive()
            indices = mine[turn * size : (turn + 1) * size]
            empty = not len(indices)
            batch = runtime.place(task.test.__getitems__([0] if empty else indices.tolist()))
            with watch.over(len(batch["x"])) if watch and not turn else nullcontext():
                output = model.output(batch["x"])
            if output is None:
                continue
            counted = 0.0 if empty else model.metric_weight
            for name, value in task.evaluate(output, batch).items():
                totals[name] = totals.get(name, 0.0) + (float(value) * counted if counted else 0.0)
    model.train(True)
    if isinstance(loss_module, nn.Module):
        loss_module.train()
    return runtime.add_up(totals)


class _Whole(nn.Module):
    """A spread model as a module that can be called, by all ranks together."""

    def __init__(self, model: ParallelModel, runtime: Runtime) -> None:
        super().__init__()
        self._output = model.output_everywhere
        self.like = nn.Parameter(torch.zeros((), dtype=runtime.dtype, device=runtime.device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self._output(x)


def drive(task: Task, model: Model, runtime: Runtime, seed: int, alive: Callable[[], None]) -> dict[str, float]:
    """Sums of the workload's test beyond the held-out data, if it has one; equal on all ranks.

    `alive` is called whenever the model is asked. Replicas share the work; ranks of a spread model all do the same.
    """
    spread = isinstance(model, ParallelModel)
    called = _Whole(model, runtime) if isinstance(model, ParallelModel) else model.unwrapped
    watched = called.register_forward_pre_hook(lambda module, inputs: alive())
    model.train(False)
    try:
        with torch.no_grad():
            sums = task.closed_loop(called, 0 if spread else runtime.rank, 1 if spread else runtime.ranks, seed)
    finally:
        watched.remove()
    model.train(True)
    return runtime.add_up(sums) if sums and not spread else sums
