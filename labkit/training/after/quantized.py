"""The trained network quantized, beside itself as it is: loss and metric, bytes, latency, and which layers suffer.

Made by the first rank from a copy of the whole model, after the last update. Latency is that of this rank with its
threads.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from labkit.experiment.schema import Quantization
from labkit.quantization.calibration import magnitudes
from labkit.quantization.converted import ConvertedLinear, convert, num_bytes
from labkit.quantization.linear import chosen
from labkit.training.after.variants import BATCHES, bare, evaluated, fetched, inputs, latency
from labkit.workloads.base import Task

MOST_LAYERS, MOST_SAMPLES = 12, 64
"""Of the sensitivity: so many layers, evenly chosen, on so many samples."""
CALIBRATED_ON, AT_ONCE = 256, 32
"""Training samples for calibration, and how many of them go through the network at a time."""


@torch.no_grad()
def quantize(task: Task, model: nn.Module, settings: Quantization, alive: Callable[[], None]) -> dict[str, Any]:
    """The fields of the event `quantized`. `alive` is called again and again."""
    whole = bare(model)
    device = next(whole.parameters()).device
    names = [name for name, _ in chosen(whole, settings.head)]
    largest = calibrated(task, whole, settings, names, device, alive)
    small = deepcopy(whole)
    convert(small, settings.after_training, settings.head, settings.qat, largest=largest)
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
        "latency_seconds": {str(size): latency(models, inputs(task, size, device), alive) for size in BATCHES},
        "sensitivity": sensitivity(task, whole, settings, names, largest, device, alive),
    }


def calibrated(
    task: Task,
    whole: nn.Module,
    settings: Quantization,
    names: list[str],
    device: torch.device,
    alive: Callable[[], None],
) -> dict[str, float]:
    """What `convert` has to know of the inputs of layers, from the first training samples; {} where it is nothing."""
    if settings.after_training != "int8_static":
        return {}
    count = min(CALIBRATED_ON, len(task.train))
    batches = (
        fetched(task.train, list(range(begin, min(begin + AT_ONCE, count))), device)["x"]
        for begin in range(0, count, AT_ONCE)
    )
    return magnitudes(whole, names, batches, settings.calibration, alive)


def sensitivity(
    task: Task,
    whole: nn.Module,
    settings: Quantization,
    names: list[str],
    largest: dict[str, float],
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
        convert(one, settings.after_training, settings.head, settings.qat, [name], largest)
        found.append([name, evaluated(task, one, device, count, alive)["loss"] - base])
    return found
