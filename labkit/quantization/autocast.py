"""Mixed precision: weights in float32, matrix products in half precision (Micikevicius et al. 2018, arXiv:1710.03740).

Under autocast torch chooses the dtype of each operation: matrix products in half precision; sums, norms and losses in
float32. bfloat16 has the range of float32, so the loss needs no scaling. float16 ends at 65,504 and at 6e-8: gradients
would vanish, so the loss is multiplied by a large scale before the backward pass and the gradients are divided by it
afterwards; if something overflows, the optimizer step is skipped and the scale is halved.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from labkit.experiment.problem import Problem
from labkit.quantization import rules
from labkit.quantization.full import Single

if TYPE_CHECKING:
    from labkit.experiment.machine import Machine
    from labkit.experiment.schema import Experiment

FIELD = "quantization.training"


class BFloat16(Single):
    """Autocast to bfloat16 by Accelerate."""

    products = "bf16"
    mixed_precision = "bf16"

    @staticmethod
    def warnings(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield a warning if the CPU has to emulate the products, which is slow."""
        return rules.slow_without(experiment, machine, FIELD, rules.BF16_FLAGS, "bfloat16")


class Float16(Single):
    """Autocast to float16 with a scaled loss by Accelerate; GPUs only."""

    products = "fp16"
    mixed_precision = "fp16"

    @staticmethod
    def missing(machine: Machine) -> str:
        """Return why this machine cannot offer it; empty if it can."""
        return "" if machine.gpus else f"float16 needs a GPU ({machine.gpu_reason})"

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield the reasons why it cannot run: it needs GPUs, full replicas and gradients that nothing else reads."""
        if experiment.launch.device == "cpu":
            reason = (
                "on CPUs Accelerate silently computes float32 under this name, and torch's own float16 products take "
                "four to five times as long as float32"
            )
            yield Problem(FIELD, reason, "bf16")
        why = "ranks that hold parts of one model do not agree on the scale of the loss"
        yield from rules.whole_replicas_only(experiment, FIELD, "bf16", why)
        yield from rules.synchronous_only(experiment, FIELD, "bf16", "works on gradients that are not scaled")
        if experiment.gradients.compression.method != "none":
            reason = "gradients of a scaled loss cannot be compressed"
            yield Problem("gradients.compression.method", reason, "none")
        if experiment.workload.options.get("balance_loss"):
            yield Problem("workload.balance_loss", "the router loss is not scaled with the task loss", 0)
