"""Rules that several precisions share. No torch import, because forms and commands read them."""

from __future__ import annotations

from collections.abc import Iterator

from labkit.experiment.machine import Machine
from labkit.experiment.problem import Problem
from labkit.experiment.schema import Experiment
from labkit.experiment.update_rule import update_rule

INT8_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"})
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""CPU flags, any of which stands for instructions that multiply such numbers."""


def needs_linear_layers(experiment: Experiment, field: str, off: str) -> Iterator[Problem]:
    """Yield a problem if the only linear layer of the network is the output layer, which is not quantized."""
    workload = experiment.workload
    if workload.options.get("model") == "resnet" and not experiment.quantization.head:
        reason = (
            "a residual network has convolutions and one linear layer, which computes the logits and is not quantized "
            "(quantization.head)"
        )
        yield Problem(field, reason, off)


def synchronous_only(experiment: Experiment, field: str, off: object, why: str) -> Iterator[Problem]:
    """Yield a problem if the update rule is not synchronous; `why` says what the others would do."""
    update = update_rule(experiment)
    if not update.is_synchronous:
        yield Problem(field, f"{update.key} {why}", off)


def whole_replicas_only(experiment: Experiment, field: str, off: str, why: str) -> Iterator[Problem]:
    """Yield a problem if the layout shards the model over ranks."""
    layout = experiment.layout
    if layout.world_size != layout.dp_replicate:
        yield Problem(field, f"{why}, the layout is {layout}", off)


def tied_over_stages(experiment: Experiment, field: str, off: object) -> Iterator[Problem]:
    """Yield a problem if two stages have copies of a tied weight, which random rounding would make differ."""
    if experiment.layout.pp > 1 and experiment.workload.options.get("tied"):
        reason = "copies of the tied weight on two stages would be rounded differently and drift apart (workload.tied)"
        yield Problem(field, reason, off)


def slow_without(
    experiment: Experiment, machine: Machine, field: str, flags: frozenset[str], what: str
) -> Iterator[Problem]:
    """Yield a warning if the CPU has none of these flags."""
    if experiment.launch.device == "cpu" and machine.cpu_flags and not machine.cpu_flags & flags:
        yield Problem(field, f"this CPU has no instructions for {what}: correct, but slower than float32")
