"""Tools to compare the trained network with other forms of itself: plain copy, metrics, latency."""

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
"""Batch sizes for which latency is measured."""
PATIENCE_S = 0.3
"""Seconds of measuring per batch size; at least three repeats are made in any case."""


def unwrap_copy(model: nn.Module) -> nn.Module:
    """Return a float32 copy in eval mode without quantized operations, sparse kernels and autocast."""
    copy = deepcopy(model)
    vars(copy).pop("forward", None)  # Accelerate's wrapper, which runs the model under autocast
    dequantize(copy)
    densify(copy)
    return copy.float().requires_grad_(False).eval()


def load_batch(data: Data, indices: list[int], device: torch.device) -> Batch:
    """Return the samples with these indices as a batch on `device`, floating-point tensors in float32."""
    batch = data.__getitems__(indices)
    return {name: place_tensor(x, device, torch.float32) for name, x in batch.items()}


def inputs(task: Task, size: int, device: torch.device) -> Tensor:
    """Return a batch of `size` held-out inputs, repeated from the beginning if there are fewer."""
    return load_batch(task.test, [index % len(task.test) for index in range(size)], device)["x"]


def evaluated(
    task: Task, model: nn.Module, device: torch.device, count: int, heartbeat: Callable[[], None]
) -> dict[str, float]:
    """Return the metrics over the first `count` held-out samples."""
    sums: dict[str, float] = {}
    for begin in range(0, count, BATCH):
        heartbeat()
        batch = load_batch(task.test, list(range(begin, min(begin + BATCH, count))), device)
        for name, value in task.evaluate(model(batch["x"]), batch).items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return task.metrics(sums)


def latency(models: Mapping[str, nn.Module], x: Tensor, heartbeat: Callable[[], None]) -> dict[str, float]:
    """Return median seconds of a forward pass over `x`, by model, measured alternately (A B A B), 3 times or more."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        heartbeat()
        timed(model, x)
    deadline, repeats = time.perf_counter() + PATIENCE_S, 0
    while repeats < 3 or (time.perf_counter() < deadline and repeats < 50):
        repeats += 1
        for name, model in models.items():
            heartbeat()
            times[name].append(timed(model, x))
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def timed(model: nn.Module, x: Tensor) -> float:
    """Return the seconds of one forward pass over `x`."""
    begin = time.perf_counter()
    model(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin
