"""Held-out metrics: every rank evaluates a part of the data, and sums are all-reduced, so that the result is exact."""

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
"""Maximum number of held-out samples that one rank evaluates at once."""
Model = ReplicatedModel | ParallelModel


def batch_size(experiment: Experiment, device: torch.device) -> int:
    """Return how many held-out samples one rank evaluates at once.

    On a GPU it is never more than a micro-batch of the training: what fits in training must fit in the evaluation too
    (with a vocabulary of 32,000 and a context of 1,024, the logits of 256 samples take 33 GB).
    """
    if device.type != "cuda":
        return BATCH
    shares = experiment.layout.data_parallel * experiment.gradients.accumulation
    return min(BATCH, math.ceil(experiment.training.global_batch / shares))


def evaluate(
    task: Task,
    model: Model,
    runtime: Runtime,
    heartbeat: Callable[[], None],
    size: int,
    probe: LayerProbe | None = None,
) -> dict[str, float]:
    """Return metric sums over the whole held-out set, equal on all ranks, computed on `size` samples at once.

    `heartbeat` is called before every batch; `probe` records the layers of this rank in the first one.
    """
    index, shares = runtime.mesh.data_shard
    own_indices = np.array_split(np.arange(len(task.test)), shares)[index]
    # Ranks that work together on a sample must all run equally often: each share has as many batches as the longest.
    longest = math.ceil(len(task.test) / shares)
    batches = max(1, math.ceil(longest / size))
    totals: dict[str, float] = {}
    model.train(False)
    loss_module = getattr(task, "loss_module", None)
    if isinstance(loss_module, nn.Module):  # its state must not change either
        loss_module.eval()
    with torch.no_grad():
        for number in range(batches):
            heartbeat()
            indices = own_indices[number * size : (number + 1) * size]
            empty = not len(indices)
            batch = runtime.place(task.test.__getitems__([0] if empty else indices.tolist()))
            with probe.over(len(batch["x"])) if probe and not number else nullcontext():
                output = model.output(batch["x"])
            if output is None:
                continue
            weight = 0.0 if empty else model.metric_weight
            for name, value in task.evaluate(output, batch).items():
                totals[name] = totals.get(name, 0.0) + (float(value) * weight if weight else 0.0)
    model.train(True)
    if isinstance(loss_module, nn.Module):
        loss_module.train()
    return runtime.add_up(totals)


class _CallableModel(nn.Module):
    """Wraps a sharded model as a callable module; all ranks must call it together."""

    def __init__(self, model: ParallelModel, runtime: Runtime) -> None:
        super().__init__()
        self._output = model.output_everywhere
        self.like = nn.Parameter(torch.zeros((), dtype=runtime.dtype, device=runtime.device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self._output(x)


def evaluate_closed_loop(
    task: Task, model: Model, runtime: Runtime, seed: int, heartbeat: Callable[[], None]
) -> dict[str, float]:
    """Return the sums of the workload's closed-loop test, if it has one; equal on all ranks.

    `heartbeat` is called before each forward pass. Replicas share the work; ranks of a sharded model all do all of it.
    """
    sharded = isinstance(model, ParallelModel)
    module = _CallableModel(model, runtime) if isinstance(model, ParallelModel) else model.unwrapped
    hook = module.register_forward_pre_hook(lambda module, inputs: heartbeat())
    model.train(False)
    try:
        with torch.no_grad():
            sums = task.closed_loop(module, 0 if sharded else runtime.rank, 1 if sharded else runtime.ranks, seed)
    finally:
        hook.remove()
    model.train(True)
    return runtime.add_up(sums) if sums and not sharded else sums
