"""Linear layers in 8-bit floating point (Micikevicius et al. 2022, arXiv:2209.05433), on GPUs that support it.

Accelerate converts the layers with torchao (`AORecipeKwargs`); the first and the last stay in bfloat16. Weights and the
optimizer stay in float32; everything else runs under autocast to bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from labkit.experiment.problem import Problem
from labkit.quantization import rules
from labkit.quantization.full import Single

if TYPE_CHECKING:
    from labkit.experiment.machine import Machine
    from labkit.experiment.schema import Experiment

FIELD = "quantization.training"
LEAST = (8, 9)
"""Compute capability of the first GPUs with such products (Ada; Hopper is 9.0)."""


class Float8(Single):
    """8-bit floating point by Accelerate and torchao."""

    products = "fp8"
    layers_from = "torchao"
    computes_with_stored_weights = False

    mixed_precision = "fp8"

    @staticmethod
    def handlers() -> list[Any]:
        """Return Accelerate's recipe for torchao: one scale per tensor, weights that stay ordinary float32 tensors.

        Accelerate's default lets FSDP gather weights in fp8; each weight then becomes a subclass of Tensor without
        storage of its own, which no checkpoint and no trace can read.
        """
        from accelerate.utils import AORecipeKwargs
        from torchao.float8 import Float8LinearConfig

        return [AORecipeKwargs(config=Float8LinearConfig(pad_inner_dim=True))]

    @staticmethod
    def missing(machine: Machine) -> str:
        """Return why this machine cannot offer it; empty if it can."""
        reason = machine.lacks_capability("fp8 needs", LEAST)
        if reason or find_spec("torchao") is not None:
            return reason
        return "fp8 needs the package torchao, which is not installed"

    @classmethod
    def problems(cls, experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield the reasons why it cannot run: it needs such a GPU, torchao and full replicas."""
        reason = cls.missing(machine)
        if reason or experiment.launch.device == "cpu":
            yield Problem(FIELD, reason or "fp8 needs a GPU (launch.device)", "bf16")
        why = "Accelerate converts the layers of full models only"
        yield from rules.whole_replicas_only(experiment, FIELD, "bf16", why)
        yield from rules.synchronous_only(experiment, FIELD, "bf16", "was not tried with converted layers")
