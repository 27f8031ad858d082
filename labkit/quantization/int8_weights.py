"""Weights on an int8 grid without a higher-precision copy: what training loses if it keeps 8 bits per weight.

After each optimizer step every weight is rounded to one of its two neighbours on the grid of its row (255 values
between ± the largest), at random so that it is unbiased (stochastic rounding, Gupta et al. 2015, arXiv:1502.02551).

It is emulated: the values are those of int8 with a scale, but they are stored and multiplied in float32, so that every
layout works unchanged. Nothing here is smaller or faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


class Int8Weights(Single):
    """Trains with weights on the int8 grid (emulated)."""

    products = "fp32"
    layers_from = "labkit"

    @staticmethod
    def arithmetic(settings: Quantization) -> Callable[[], QuantizedLinearOp] | None:
        """Return a factory of float products with weights that are rounded to the grid after each optimizer step."""
        from labkit.quantization.arithmetic import GridArithmetic

        return GridArithmetic

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield the reasons why it cannot run: it needs linear layers, and nothing else may change the weights."""
        yield from rules.needs_linear_layers(experiment, FIELD, "fp32")
        why = "averages weights or changes them itself, which leaves the grid"
        yield from rules.synchronous_only(experiment, FIELD, "fp32", why)
        if experiment.quantization.head:
            yield from rules.tied_over_stages(experiment, FIELD, "fp32")
