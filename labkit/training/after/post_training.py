"""What is looked at once the training is over: the trained network in other forms, beside itself.

Each look is one function and one event, made by the first rank while the others wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import nn

from labkit.experiment import Experiment
from labkit.experiment.run_directory import RunDirectory
from labkit.training.after import exported, kernels, quantized
from labkit.training.probes.layers import LayerProbe
from labkit.workloads.base import Task


@dataclass(frozen=True)
class Trained:
    """What the first rank holds after the last update."""

    experiment: Experiment
    task: Task
    directory: RunDirectory
    model: nn.Module
    """Its part of the network: the whole of it where the rules of a look ask for that."""
    alive: Callable[[], None]
    """To be called again and again meanwhile."""
    autocast: Callable[[], AbstractContextManager[Any]]
    """What the run's passes forward are made in."""
    watch: LayerProbe | None
    """Its layers as the last evaluation saw them; None if nothing was evaluated."""


@dataclass(frozen=True)
class PostTrainingStep:
    """`event`: its name in the events; `wanted`: does the experiment ask for it; `make`: its fields."""

    event: str
    wanted: Callable[[Experiment], bool]
    make: Callable[[Trained], dict[str, Any]]


def _quantized(trained: Trained) -> dict[str, Any]:
    return quantized.quantize(trained.task, trained.model, trained.experiment.quantization, trained.alive)


def _kernels(trained: Trained) -> dict[str, Any]:
    seen, samples = (trained.watch.layers, trained.watch.samples) if trained.watch else ([], 0)
    return kernels.measure(trained.experiment, seen, samples, trained.autocast, trained.alive)


def _exported(trained: Trained) -> dict[str, Any]:
    path, settings = trained.directory.exported, trained.experiment.sparsity
    return exported.export(trained.task, trained.model, settings, path, trained.alive)


LOOKS = (
    PostTrainingStep("quantized", lambda experiment: experiment.quantization.after_training != "none", _quantized),
    PostTrainingStep("exported", lambda experiment: experiment.sparsity.export, _exported),
    PostTrainingStep("kernels", kernels.wanted, _kernels),
)


def wanted(experiment: Experiment) -> bool:
    """Is there anything to look at?"""
    return any(look.wanted(experiment) for look in LOOKS)


def look(trained: Trained) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and fields of each event, as soon as it is made."""
    for one in LOOKS:
        if one.wanted(trained.experiment):
            begun = time.perf_counter()
            found = one.make(trained)
            yield one.event, {"seconds": time.perf_counter() - begun} | found
