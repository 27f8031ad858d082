"""Training with int8 matrix products: all three of every linear layer (as SwitchBack, Wortsman et al. 2023,
arXiv:2304.13013, and torchao's int8 mixed-precision training).

Weights and the optimizer stay float32. Each operand is rounded to 8 bits with a scale per row or column when it is
multiplied (arithmetic.py). `quantization.rounding` says how gradients are rounded, `quantization.weight_gradient`
whether the gradient of the weight is an int8 product too. The last linear layer stays as it is (`quantization.head`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from labkit.quantization import rules
from labkit.quantization.full import Single

if TYPE_CHECKING:
    from labkit.experiment.machine import Machine
    from labkit.experiment.problem import Problem
    from labkit.experiment.schema import Experiment, Quantization
    from labkit.quantization.linear import QuantizedLinearOp

FIELD = "quantization.training"


class Int8(Single):
    """int8 matrix products."""

    @staticmethod
    def arithmetic(settings: Quantization) -> Callable[[], QuantizedLinearOp] | None:
        """Three int8 products, or two."""
        from labkit.quantization.arithmetic import Int8Arithmetic

        return partial(Int8Arithmetic, settings.rounding, settings.weight_gradient)

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Linear layers."""
        return rules.needs_linear_layers(experiment, FIELD, "fp32")

    @staticmethod
    def warnings(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Slow where the CPU has to emulate it."""
        return rules.slow_without(experiment, machine, FIELD, rules.INT8_FLAGS, "int8 products")
