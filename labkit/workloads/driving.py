"""Behaviour cloning for self-driving: the network learns an expert's action from what the car sees.

The form and the command line import this file too: torch and highway-env are imported inside functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from pydantic import Field

from labkit.experiment.problem import Problem
from labkit.experiment.registry import Options
from labkit.workloads.network import Network

if TYPE_CHECKING:
    from labkit.experiment.machine import Machine
    from labkit.experiment.schema import Experiment
    from labkit.workloads.base import Task


class DrivingOptions(Options):
    """The network, and how long it drives after the training."""

    width: int = Field(default=256, ge=4, le=8192)
    """Units of each layer."""
    depth: int = Field(default=2, ge=1, le=64)
    """Layers after the one that processes the vehicles."""
    episodes: int = Field(default=20, ge=0, le=10_000)
    """Episodes that the trained network drives in the simulator, shared by the ranks; 0 for none."""


class Driving:
    """Behaviour cloning; the metric is held-out accuracy, and in the simulator distance and crashes."""

    Options = DrivingOptions

    @classmethod
    def problems(cls, experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        from labkit.workloads.driving_data import about

        options = DrivingOptions(**experiment.workload.options)
        samples = about()["train_samples"]
        if experiment.training.global_batch > samples:
            yield Problem(
                "training.global_batch",
                f"the training set has {samples} samples, fewer than a batch of {experiment.training.global_batch}",
                samples,
            )
        if options.episodes and find_spec("highway_env") is None:
            yield Problem("workload.episodes", "the simulated road needs highway-env: pip install highway-env", 0)

    @classmethod
    def describe(cls, options: DrivingOptions) -> Network:
        """Return what layouts need to know of the network."""
        return Network(options.depth + 2, tp_sizes={f"a width of {options.width}": options.width})

    @classmethod
    def build(cls, options: Any, seed: int) -> Task:
        """Read the recorded drives and build the network from a DrivingOptions, its fields or a section."""
        from labkit.workloads.driving_task import DrivingTask
        from labkit.workloads.options import read

        options = read(DrivingOptions, options)
        return DrivingTask(options.width, options.depth, options.episodes, seed)
