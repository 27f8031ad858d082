"""Quantization-aware training (Jacob et al. 2018, arXiv:1712.05877): the later rounding is simulated in training.

In the forward pass, inputs and weights of every linear layer are rounded to the grid of the later conversion (codes.py)
and multiplied in float32; gradients use a straight-through estimator. It starts after `quantization.qat_start` of the
training. Training is slower, but the converted network loses less accuracy.
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
    from labkit.experiment.schema import Experiment
    from labkit.experiment.sections import Quantization
    from labkit.quantization.linear import QuantizedLinearOp

FIELD = "quantization.qat"


class Int8Aware(Single):
    """Rounds weights to int8 per row and inputs to int8 per token."""

    bits: ClassVar[int] = 8
    fitting: ClassVar[tuple[str, ...]] = ("none", "int8_dynamic", "int8_weight_only")
    """Conversions that use the same grid for weights."""

    @classmethod
    def arithmetic(cls, settings: Quantization) -> Callable[[], QuantizedLinearOp] | None:
        """Return a factory of products of rounded inputs and weights in float32."""
        from labkit.quantization.arithmetic import FakeArithmetic

        return partial(FakeArithmetic, cls.bits)

    @classmethod
    def problems(cls, experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield the reasons why it cannot run: it needs float32 linear layers and a conversion to the same grid."""
        settings = experiment.quantization
        yield from rules.needs_linear_layers(experiment, FIELD, "none")
        if settings.training != "fp32":
            reason = f"rounding is simulated in float32 layers; {settings.training} computes them differently"
            yield Problem("quantization.training", reason, "fp32")
        if settings.after_training not in cls.fitting:
            reason = f"{settings.qat} trains for another grid than that of {settings.after_training}"
            yield Problem("quantization.after_training", reason, cls.fitting[1])

    @classmethod
    def warnings(cls, experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield a warning if the grid differs from that of the conversion."""
        if experiment.layout.tp > 1:
            yield Problem(FIELD, "where tp shards the inputs of a layer, each shard has its own scales")


class Int4Aware(Int8Aware):
    """Rounds weights to int4 in groups of 32 inputs and inputs to int8 per token."""

    bits = 4
    fitting = ("none", "int4_weight_only")
