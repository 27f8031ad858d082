"""Quantization-aware training (Jacob et al. 2018, arXiv:1712.05877): the network feels the rounding while it learns.

Forward, inputs and weights of every linear layer are rounded to the grid of the later conversion (codes.py) and
multiplied in float32; a gradient passes the rounding as if it were not there. It begins after `quantization.qat_start`
of the training. It is slower than training without it: what it gains is what conversion no longer loses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from labkit.experiment.problem import Problem
from labkit.quantization import rules
from labkit.quantization.full import Single

if TYPE_CHECKING:
    from labkit.experiment.machine import Machine
    from labkit.experiment.schema import Experiment, Quantization
    from labkit.quantization.linear import QuantizedLinearOp

FIELD = "quantization.qat"


class Int8Aware(Single):
    """Weights int8 per row, inputs int8 per token."""

    bits: ClassVar[int] = 8
    fitting: ClassVar[tuple[str, ...]] = ("none", "int8_dynamic", "int8_weight_only")
    """Conversions to the grid of its weights."""

    @classmethod
    def arithmetic(cls, settings: Quantization) -> Callable[[], QuantizedLinearOp] | None:
        """Rounded, then multiplied in float32."""
        from labkit.quantization.arithmetic import FakeArithmetic

        return partial(FakeArithmetic, cls.bits)

    @classmethod
    def problems(cls, experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Linear layers in float32, to be converted to the grid they were trained for."""
        settings = experiment.quantization
        yield from rules.needs_linear_layers(experiment, FIELD, "none")
        if settings.training != "fp32":
            reason = f"rounding is felt in float32 layers; {settings.training} computes them otherwise"
            yield Problem("quantization.training", reason, "fp32")
        if settings.after_training not in cls.fitting:
            reason = f"{settings.qat} trains for another grid than that of {settings.after_training}"
            yield Problem("quantization.after_training", reason, cls.fitting[1])

    @classmethod
    def warnings(cls, experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Where the grid is another one than after conversion."""
        if experiment.layout.tp > 1:
            yield Problem(FIELD, "where tp cuts the inputs of a layer, each part has scales of its own")


class Int4Aware(Int8Aware):
    """Weights int4 in groups of 32 inputs, inputs int8 per token."""

    bits = 4
    fitting = ("none", "int4_weight_only")
