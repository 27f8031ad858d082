"""Steps after the training: the trained network in other forms, compared with itself.

Each step is one function and one event, run by rank 0 while the other ranks wait.
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
    """What rank 0 has after the last optimizer step."""

    experiment: Experiment
    task: Task
    directory: RunDirectory
    model: nn.Module
    """This rank's part of the network; the full model if the rules of a step require it."""
    heartbeat: Callable[[], None]
    """Function to call regularly, so that the supervisor does not take the rank for stalled."""
    autocast: Callable[[], AbstractContextManager[Any]]
    """Context of the run's forward passes."""
    probe: LayerProbe | None
    """Layers of this rank as recorded in the last evaluation; None if nothing was evaluated."""


@dataclass(frozen=True)
class PostTrainingStep:
    """One step: name of its event, whether an experiment requests it, and the function that returns its fields."""

    event: str
    is_requested: Callable[[Experiment], bool]
    run: Callable[[Trained], dict[str, Any]]


def _quantized(trained: Trained) -> dict[str, Any]:
    return quantized.quantize(trained.task, trained.model, trained.experiment.quantization, trained.heartbeat)


def _kernels(trained: Trained) -> dict[str, Any]:
    layers, samples = (trained.probe.layers, trained.probe.samples) if trained.probe else ([], 0)
    return kernels.measure(trained.experiment, layers, samples, trained.autocast, trained.heartbeat)


def _exported(trained: Trained) -> dict[str, Any]:
    path, settings = trained.directory.exported, trained.experiment.sparsity
    return exported.export(trained.task, trained.model, settings, path, trained.heartbeat)


STEPS = (
    PostTrainingStep("quantized", lambda experiment: experiment.quantization.after_training != "none", _quantized),
    PostTrainingStep("exported", lambda experiment: experiment.sparsity.export, _exported),
    PostTrainingStep("kernels", kernels.is_requested, _kernels),
)


def is_requested(experiment: Experiment) -> bool:
    """Return True if the experiment requests any of the steps."""
    return any(step.is_requested(experiment) for step in STEPS)


def run_steps(trained: Trained) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run the requested steps; yield name and fields of each event."""
    for step in STEPS:
        if step.is_requested(trained.experiment):
            begin = time.perf_counter()
            fields = step.run(trained)
            yield step.event, {"seconds": time.perf_counter() - begin} | fields
