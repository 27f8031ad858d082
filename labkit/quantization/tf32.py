"""TensorFloat-32: float32 throughout, but GPUs round the factors of matrix products to 10 bits of mantissa.

A product of an H200 is nine times as fast as in float32, which runs without tensor cores (440 and 51 TFLOP/s, measured
with 8192 × 8192), and loses about three decimal digits. Weights, sums and everything else stay float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from labkit.experiment.problem import Problem
from labkit.quantization.full import Single

if TYPE_CHECKING:
    from labkit.experiment.machine import Machine
    from labkit.experiment.schema import Experiment

FIELD = "quantization.training"
LEAST = (8, 0)
"""Compute capability of the first GPUs with such products (A100)."""


class TensorFloat32(Single):
    """Trains in float32 with TF32 products; GPUs only."""

    products = "tf32"

    @staticmethod
    def prepare() -> None:
        """Let cuBLAS and cuDNN use TF32."""
        import torch

        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cuda.matmul.allow_tf32 = True

    @staticmethod
    def missing(machine: Machine) -> str:
        """Return why this machine cannot offer it; empty if it can."""
        return machine.lacks_capability("TF32 needs", LEAST)

    @classmethod
    def problems(cls, experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield the reason why it cannot run: it needs such a GPU."""
        reason = cls.missing(machine)
        if reason or experiment.launch.device == "cpu":
            yield Problem(FIELD, reason or "TF32 needs a GPU (launch.device)", "fp32")
