"""Quantization of the trained network, on a copy of it: what it saves, what it costs.

| method           | weights                | inputs              | product             |
|------------------|------------------------|---------------------|---------------------|
| int8_dynamic     | int8 per row           | int8 per token      | int8 (torch._int_mm)|
| int8_weight_only | int8 per row           | as they are         | float32             |
| int4_weight_only | int4 in groups of 32   | as they are         | float32             |

Only linear layers are converted, the last one only with `quantization.head`. After quantization-aware training with
int4 inputs are rounded as they were there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from labkit.experiment.problem import Problem
from labkit.quantization import rules
from labkit.quantization.full import Single

if TYPE_CHECKING:
    from labkit.experiment.machine import Machine
    from labkit.experiment.schema import Experiment

FIELD = "quantization.after_training"


class Converted(Single):
    """Base of the methods."""

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """The first rank needs the whole model, in a form that can be converted."""
        yield from rules.needs_linear_layers(experiment, FIELD, "none")
        layout, training = experiment.layout, experiment.quantization.training
        spread = [axis for axis in ("tp", "pp", "ep", "cp") if getattr(layout, axis) > 1]
        if layout.dp_shard > 1 and layout.zero_stage == 3:
            spread.append("ZeRO stage 3")
        if spread:
            reason = f"the first rank converts the whole model, and with {' and '.join(spread)} it holds a part of it"
            yield Problem(FIELD, reason, "none")
        if experiment.launch.isolated:
            yield Problem(FIELD, "copies that do not train together have nothing to keep (launch.isolated)", "none")
        if training in ("bitnet", "fp8"):
            yield Problem(FIELD, f"layers trained in {training} compute something else than those converted", "none")


class Int8Dynamic(Converted):
    """int8 weights and inputs."""


class Int8WeightOnly(Converted):
    """int8 weights."""


class Int4WeightOnly(Converted):
    """int4 weights."""
