"""The trained network quantized, compared with itself in float32: metrics, bytes, latency, sensitivity of layers.

Rank 0 quantizes a copy of the full model after the last step. Latency is measured on this rank with its number of
threads.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from labkit.experiment.sections import Quantization
from labkit.quantization.calibration import magnitudes
from labkit.quantization.converted import ConvertedLinear, convert, num_bytes
from labkit.quantization.linear import chosen
from labkit.training.after.variants import BATCHES, evaluated, inputs, latency, load_batch, unwrap_copy
from labkit.workloads.base import Task

MOST_LAYERS, MOST_SAMPLES = 12, 64
"""Sensitivity is measured for up to 12 evenly spaced layers, on up to 64 samples."""
CALIBRATED_ON, AT_ONCE = 256, 32
"""Number of training samples for calibration, and their batch size."""


@torch.no_grad()
def quantize(task: Task, model: nn.Module, settings: Quantization, heartbeat: Callable[[], None]) -> dict[str, Any]:
    """Quantize a copy of `model` and return the fields of the event `quantized`; `heartbeat` is called regularly."""
    full = unwrap_copy(model)
    device = next(full.parameters()).device
    names = [name for name, _ in chosen(full, settings.head)]
    largest = calibrated(task, full, settings, names, device, heartbeat)
    small = deepcopy(full)
    convert(small, settings.after_training, settings.head, settings.qat, largest=largest)
    models = {"float": full, "quantized": small}
    count = len(task.test)
    return {
        "method": settings.after_training,
        "qat": settings.qat,
        "layers": sum(isinstance(module, ConvertedLinear) for module in small.modules()),
        "samples": count,
        "metrics": {name: evaluated(task, variant, device, count, heartbeat) for name, variant in models.items()},
        "bytes": {name: num_bytes(variant) for name, variant in models.items()},
        "layer_bytes": {
            "float": sum(num_bytes(full.get_submodule(name)) for name in names),
            "quantized": sum(num_bytes(small.get_submodule(name)) for name in names),
        },
        "latency_seconds": {str(size): latency(models, inputs(task, size, device), heartbeat) for size in BATCHES},
        "sensitivity": sensitivity(task, full, settings, names, largest, device, heartbeat),
    }


def calibrated(
    task: Task,
    full: nn.Module,
    settings: Quantization,
    names: list[str],
    device: torch.device,
    heartbeat: Callable[[], None],
) -> dict[str, float]:
    """Return the largest input magnitude by layer, from the first training samples; {} if the method needs none."""
    if settings.after_training != "int8_static":
        return {}
    count = min(CALIBRATED_ON, len(task.train))
    batches = (
        load_batch(task.train, list(range(begin, min(begin + AT_ONCE, count))), device)["x"]
        for begin in range(0, count, AT_ONCE)
    )
    return magnitudes(full, names, batches, settings.calibration, heartbeat)


def sensitivity(
    task: Task,
    full: nn.Module,
    settings: Quantization,
    names: list[str],
    largest: dict[str, float],
    device: torch.device,
    heartbeat: Callable[[], None],
) -> list[list[Any]]:
    """Return [layer, change of the loss if only this layer is quantized], in the order of the model."""
    count = min(MOST_SAMPLES, len(task.test))
    base = evaluated(task, full, device, count, heartbeat)["loss"]
    limit = min(MOST_LAYERS, len(names))
    tested_names = [names[index * len(names) // limit] for index in range(limit)]
    changes: list[list[Any]] = []
    for name in tested_names:
        variant = deepcopy(full)
        convert(variant, settings.after_training, settings.head, settings.qat, [name], largest)
        changes.append([name, evaluated(task, variant, device, count, heartbeat)["loss"] - base])
    return changes
