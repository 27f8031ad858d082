"""What it takes to set the trained network beside other forms of itself: a bare copy, metrics, latency in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn

from labkit.parallel.cast import place_tensor
from labkit.quantization.converted import dequantize
from labkit.sparsity.export import densify
from labkit.training.evaluation import BATCH
from labkit.workloads.base import Batch, Data, Task

BATCHES = (1, 32, 512)
"""Batch sizes whose latency is measured."""
PATIENCE_S = 0.3
"""For each of them; three repeats in any case."""


def bare(model: nn.Module) -> nn.Module:
    """A copy in float32 without arithmetic or kernels of its own, autocast or recomputation, ready to be evaluated."""
    copy = deepcopy(model)
    vars(copy).pop("forward", None)  # Accelerate's, which runs the model under autocast
    dequantize(copy)
    densify(copy)
    return copy.float().requires_grad_(False).eval()


def fetched(data: Data, indices: list[int], device: torch.device) -> Batch:
    """Samples in float32."""
    batch = data.__getitems__(indices)
    return {name: place_tensor(x, device, torch.float32) for name, x in batch.items()}


def inputs(task: Task, size: int, device: torch.device) -> Tensor:
    """A batch of `size` held-out inputs, from the beginning again where there are fewer."""
    return fetched(task.test, [index % len(task.test) for index in range(size)], device)["x"]


def evaluated(
    task: Task, model: nn.Module, device: torch.device, count: int, alive: Callable[[], None]
) -> dict[str, float]:
    """Metrics over the first `count` held-out samples."""
    sums: dict[str, float] = {}
    for begin in range(0, count, BATCH):
        alive()
        batch = fetched(task.test, list(range(begin, min(begin + BATCH, count))), device)
        for name, value in task.evaluate(model(batch["x"]), batch).items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return task.metrics(sums)


def latency(models: Mapping[str, nn.Module], x: Tensor, alive: Callable[[], None]) -> dict[str, float]:
    """Median seconds of one forward pass over `x`, by model; measured in turn (A B A B), at least three times each."""
    found: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        alive()
        timed(model, x)
    deadline, repeats = time.perf_counter() + PATIENCE_S, 0
    while repeats < 3 or (time.perf_counter() < deadline and repeats < 50):
        repeats += 1
        for name, model in models.items():
            alive()
            found[name].append(timed(model, x))
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def timed(model: nn.Module, x: Tensor) -> float:
    """Seconds of one forward pass."""
    begun = time.perf_counter()
    model(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun
