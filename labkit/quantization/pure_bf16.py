"""Weights, gradients and activations in bfloat16: half the bytes of float32, without a float32 copy of the weights.

The optimizer computes each step in float32 and rounds the weights stochastically (optimizers.py); rounded to nearest,
small changes would vanish. Moments are float32, or 8 bits with optimizer.state_bits. The loss is computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from labkit.experiment.problem import Problem
from labkit.quantization import rules
from labkit.quantization.full import Single

if TYPE_CHECKING:
    import torch

    from labkit.experiment.machine import Machine
    from labkit.experiment.schema import Experiment

FIELD = "quantization.training"


class PureBFloat16(Single):
    """Trains in bfloat16 throughout."""

    products = "bf16"
    own_optimizer = True

    @staticmethod
    def dtype() -> torch.dtype:
        import torch

        return torch.bfloat16

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield the reasons why it cannot run: no compressor, and only the optimizer may change weights."""
        why = "averages weights or applies gradients in a way that would round them to the nearest bfloat16"
        yield from rules.synchronous_only(experiment, FIELD, "bf16", why)
        yield from rules.tied_over_stages(experiment, FIELD, "bf16")
        if experiment.gradients.compression.method != "none" or experiment.gradients.hierarchical:
            field = "gradients.hierarchical" if experiment.gradients.hierarchical else "gradients.compression.method"
            off = "false" if experiment.gradients.hierarchical else "none"
            yield Problem(
                field, "methods that reduce gradients in several rounds store and sum them in float32, not bf16", off
            )

    @staticmethod
    def warnings(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield a warning if the CPU has to emulate the products, which is slow."""
        return rules.slow_without(experiment, machine, FIELD, rules.BF16_FLAGS, "bfloat16")
