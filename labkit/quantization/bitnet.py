"""BitNet b1.58 (Ma et al. 2024, arXiv:2402.17764): every weight of a linear layer is -1, 0 or 1 times one scale.

    w̃ = round(w / mean |w|) clamped to ±1,   x̃ = x / rms(x) rounded to 8 bits per token,   y = mean |w| · step · x̃ w̃ᵀ

The forward pass is a product of int8 matrices. The float32 weight is kept and trained, with a straight-through
estimator. The method is made for training from scratch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from labkit.experiment.problem import Problem
from labkit.quantization import rules
from labkit.quantization.full import Single

if TYPE_CHECKING:
    from labkit.experiment.machine import Machine
    from labkit.experiment.schema import Experiment
    from labkit.experiment.sections import Quantization
    from labkit.quantization.linear import QuantizedLinearOp

FIELD = "quantization.training"


class BitNet(Single):
    """Trains with ternary weights and int8 inputs."""

    layers_from = "labkit"
    computes_with_stored_weights = False

    @staticmethod
    def arithmetic(settings: Quantization) -> Callable[[], QuantizedLinearOp] | None:
        """Return a factory of products of ternary weights and int8 inputs."""
        from labkit.quantization.arithmetic import TernaryArithmetic

        return TernaryArithmetic

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield the reasons why it cannot run: it needs linear layers that are not sharded."""
        yield from rules.needs_linear_layers(experiment, FIELD, "fp32")
        if experiment.layout.tp > 1:
            reason = (
                "a layer has one scale for its whole weight and normalises its whole input: ranks with shards of "
                "them would compute another network"
            )
            yield Problem("layout.tp", reason, 1)

    @staticmethod
    def warnings(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield a warning if the CPU has to emulate the products, which is slow."""
        return rules.slow_without(experiment, machine, FIELD, rules.INT8_FLAGS, "int8 products")
