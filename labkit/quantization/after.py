"""Post-training quantization, on a copy of the trained network: what it saves and what it costs.

| method           | weights                | inputs              | product             |
|------------------|------------------------|---------------------|---------------------|
| int8_dynamic     | int8 per row           | int8 per token      | int8 (torch._int_mm)|
| int8_static      | int8 per row           | int8, calibrated    | int8 (torch._int_mm)|
| int8_weight_only | int8 per row           | float32             | float32             |
| int4_weight_only | int4 in groups of 32   | float32             | float32             |

Calibrated means one scale per layer, from the inputs of some training samples (calibration.py,
`quantization.calibration`). Only linear layers are converted, the last one only with `quantization.head`. After
quantization-aware training with int4, inputs are rounded as they were in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from labkit.experiment.after_training import first_rank_problems
from labkit.quantization import rules
from labkit.quantization.full import Single

if TYPE_CHECKING:
    from labkit.experiment.machine import Machine
    from labkit.experiment.problem import Problem
    from labkit.experiment.schema import Experiment

FIELD = "quantization.after_training"


class Converted(Single):
    """Base class of the methods."""

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield the reasons why the first rank cannot convert the full model."""
        yield from rules.needs_linear_layers(experiment, FIELD, "none")
        yield from first_rank_problems(experiment, FIELD, "none", "converts", "converted")


class Int8Dynamic(Converted):
    """Converts to int8 weights and inputs."""


class Int8Static(Converted):
    """Converts to int8 weights and inputs, with input scales from calibration."""


class Int8WeightOnly(Converted):
    """Converts to int8 weights."""


class Int4WeightOnly(Converted):
    """Converts to int4 weights."""
