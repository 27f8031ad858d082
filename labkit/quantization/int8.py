"""Training with int8 matrix products in all linear layers.

It follows SwitchBack (Wortsman et al. 2023, arXiv:2304.13013) and torchao's int8 mixed-precision training.

Weights and the optimizer stay in float32. Each operand is rounded to 8 bits with a scale per row or column when it is
multiplied (arithmetic.py). `quantization.rounding` determines how gradients are rounded, `quantization.weight_gradient`
whether the gradient of the weight is an int8 product too. The last linear layer is not changed (`quantization.head`).
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
    from labkit.experiment.schema import Experiment
    from labkit.experiment.sections import Quantization
    from labkit.quantization.linear import QuantizedLinearOp

FIELD = "quantization.training"


class Int8(Single):
    """Trains with int8 matrix products."""

    products = "int8"
    layers_from = "labkit"

    @staticmethod
    def arithmetic(settings: Quantization) -> Callable[[], QuantizedLinearOp] | None:
        """Return a factory of int8 products: three per layer, or two without `weight_gradient`."""
        from labkit.quantization.arithmetic import Int8Arithmetic

        return partial(Int8Arithmetic, settings.rounding, settings.weight_gradient)

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield a reason if the network has no linear layer to quantize."""
        return rules.needs_linear_layers(experiment, FIELD, "fp32")

    @staticmethod
    def warnings(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield a warning if the CPU has to emulate the products, which is slow."""
        return rules.slow_without(experiment, machine, FIELD, rules.INT8_FLAGS, "int8 products")
