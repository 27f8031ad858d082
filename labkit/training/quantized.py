"""The trained network quantized, beside itself as it is: loss and metric, bytes, latency, and which layers suffer.

Made by the first rank from a copy of the whole model, after the last update. Latency is that of this rank with its
threads, measured in turn (A B A B), the median of at least three.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from labkit.experiment.schema import Quantization
from labkit.quantization.converted import ConvertedLinear, convert, num_bytes, plain
from labkit.quantization.linear import chosen
from labkit.training.evaluation import BATCH
from labkit.workloads.base import Batch, Task

BATCHES = (1, 32, 512)
"""Batch sizes whose latency is measured."""
PATIENCE_S = 0.3
"""For each of them; three repeats in any case."""
MOST_LAYERS, MOST_SAMPLES = 12, 64
"""Of the sensitivity: so many layers, evenly chosen, on so many samples."""


def bare(model: nn.Module) -> nn.Module:
    """A copy in float32 without arithmetic of its own, autocast or recomputation, ready to be evaluated."""
    copy = deepcopy(model)
    vars(copy).pop("forward", None)  # Accelerate's, which runs the model under autocast
    plain(copy)
    return copy.float().requires_grad_(False).eval()


@torch.no_grad()
def quantize(task: Task, model: nn.Module, settings: Quantization, alive: Callable[[], None]) -> dict[str, Any]:
    """The fields of the event `quantized`. `alive` is called again and again."""
    whole = bare(model)
    device = next(whole.parameters()).device
    names = [name for name, _ in chosen(whole, settings.head)]
    small = deepcopy(whole)
    convert(small, settings.after_training, settings.head, settings.qat)
    models = {"float": whole, "quantized": small}
    count = len(task.test)
    return {
        "method": settings.after_training,
        "qat": settings.qat,
        "layers": sum(isinstance(module, ConvertedLinear) for module in small.modules()),
        "samples": count,
        "metrics": {name: evaluated(task, one, device, count, alive) for name, one in models.items()},
        "bytes": {name: num_bytes(one) for name, one in models.items()},
        "layer_bytes": {
            "float": sum(num_bytes(whole.get_submodule(name)) for name in names),
            "quantized": sum(num_bytes(small.get_submodule(name)) for name in names),
        },
        "latency_seconds": {str(size): latency(task, models, device, size, alive) for size in BATCHES},
        "sensitivity": sensitivity(task, whole, settings, names, device, alive),
    }


def fetched(task: Task, indices: list[int], device: torch.device) -> Batch:
    """Held-out samples in float32."""
    batch = task.test.__getitems__(indices)
    return {name: x.to(device, torch.float32 if x.is_floating_point() else None) for name, x in batch.items()}


def evaluated(
    task: Task, model: nn.Module, device: torch.device, count: int, alive: Callable[[], None]
) -> dict[str, float]:
    """Metrics over the first `count` held-out samples."""
    sums: dict[str, float] = {}
    for begin in range(0, count, BATCH):
        alive()
        batch = fetched(task, list(range(begin, min(begin + BATCH, count))), device)
        for name, value in task.evaluate(model(batch["x"]), batch).items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return task.metrics(sums)


def latency(
    task: Task, models: dict[str, nn.Module], device: torch.device, size: int, alive: Callable[[], None]
) -> dict[str, float]:
    """Median seconds of one forward pass over `size` samples, by model."""
    x = fetched(task, [index % len(task.test) for index in range(size)], device)["x"]
    found: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        _timed(model, x)
    deadline = time.perf_counter() + PATIENCE_S
    while len(found["float"]) < 3 or (time.perf_counter() < deadline and len(found["float"]) < 50):
        alive()
        for name, model in models.items():
            found[name].append(_timed(model, x))
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def _timed(model: nn.Module, x: Tensor) -> float:
    begun = time.perf_counter()
    model(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def sensitivity(
    task: Task,
    whole: nn.Module,
    settings: Quantization,
    names: list[str],
    device: torch.device,
    alive: Callable[[], None],
) -> list[list[Any]]:
    """[layer, change of the loss when it alone is quantized], in the order of the model."""
    count = min(MOST_SAMPLES, len(task.test))
    base = evaluated(task, whole, device, count, alive)["loss"]
    most = min(MOST_LAYERS, len(names))
    tried = [names[index * len(names) // most] for index in range(most)]
    found: list[list[Any]] = []
    for name in tried:
        one = deepcopy(whole)
        convert(one, settings.after_training, settings.head, settings.qat, [name])
        found.append([name, evaluated(task, one, device, count, alive)["loss"] - base])
    return found
