"""BitNet b1.58 (Ma et al. 2024, arXiv:2402.17764): every weight of a linear layer is -1, 0 or 1 times one scale.

    w̃ = round(w / mean |w|) limited to ±1,   x̃ = x / rms(x) rounded to 8 bits per token,   y = mean |w| · step · x̃ w̃ᵀ

Forward that is a product of int8 matrices. The float32 weight stays and learns: gradients pass the rounding as if it
were not there. It is made for training from scratch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from labkit.experiment.problem import Problem
from labkit.quantization import rules
from labkit.quantization.full import Single

if TYPE_CHECKING:
    from labkit.experiment.machine import Machine
    from labkit.experiment.schema import Experiment, Quantization
    from labkit.quantization.linear import QuantizedLinearOp

FIELD = "quantization.training"


class BitNet(Single):
    """Ternary weights."""

    @staticmethod
    def arithmetic(settings: Quantization) -> Callable[[], QuantizedLinearOp] | None:
        """Ternary weights times int8 inputs."""
        from labkit.quantization.arithmetic import TernaryArithmetic

        return TernaryArithmetic

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Linear layers that are whole."""
        yield from rules.needs_linear_layers(experiment, FIELD, "fp32")
        if experiment.layout.tp > 1:
            reason = (
                "a layer has one scale for its whole weight and normalises its whole input: ranks with parts of them "
                "would compute another network"
            )
            yield Problem("layout.tp", reason, 1)

    @staticmethod
    def warnings(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Slow where the CPU has to emulate it."""
        return rules.slow_without(experiment, machine, FIELD, rules.INT8_FLAGS, "int8 products")
