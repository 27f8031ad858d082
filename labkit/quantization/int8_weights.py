"""Weights on an int8 grid without a finer copy: what a training loses that keeps 8 bits of every weight.

After each update every weight goes to one of its two neighbours on the grid of its row (255 numbers between ± the
largest), up or down at random so that the mean is right (stochastic rounding, Gupta et al. 2015, arXiv:1502.02551).

Emulated: the numbers are those of int8 with a scale, but they lie in float32 memory and are multiplied in float32, so
that every layout finds the tensors that it knows. Nothing here is smaller or faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from labkit.quantization import rules
from labkit.quantization.full import Single

if TYPE_CHECKING:
    from labkit.experiment.machine import Machine
    from labkit.experiment.problem import Problem
    from labkit.experiment.schema import Experiment, Quantization
    from labkit.quantization.linear import QuantizedLinearOp

FIELD = "quantization.training"


class Int8Weights(Single):
    """Weights on the int8 grid (emulated)."""

    @staticmethod
    def arithmetic(settings: Quantization) -> Callable[[], QuantizedLinearOp] | None:
        """Ordinary products with weights that are put on the grid after each update."""
        from labkit.quantization.arithmetic import GridArithmetic

        return GridArithmetic

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Linear layers, and nobody who moves weights off the grid."""
        yield from rules.needs_linear_layers(experiment, FIELD, "fp32")
        why = "averages weights or moves them by itself, which leaves the grid"
        yield from rules.synchronous_only(experiment, FIELD, "fp32", why)
        if experiment.quantization.head:
            yield from rules.tied_over_stages(experiment, FIELD, "fp32")
