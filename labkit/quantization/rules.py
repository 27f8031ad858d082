"""What several number formats ask of an experiment. Imports no torch: forms and commands read it."""

from __future__ import annotations

from collections.abc import Iterator

from labkit.experiment.machine import Machine
from labkit.experiment.problem import Problem
from labkit.experiment.schema import Experiment

INT8_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"})
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Of a CPU that multiplies such numbers by instructions of its own."""


def needs_linear_layers(experiment: Experiment, field: str, off: str) -> Iterator[Problem]:
    """Formats of linear layers have nothing to do in a network whose only one makes the scores."""
    workload = experiment.workload
    if workload.options.get("model") == "resnet" and not experiment.quantization.head:
        reason = (
            "a residual network has convolutions, and one linear layer, which makes the scores and stays as it is "
            "(quantization.head)"
        )
        yield Problem(field, reason, off)


def synchronous_only(experiment: Experiment, field: str, off: object, why: str) -> Iterator[Problem]:
    """Update rules that average weights or moments, or apply gradients elsewhere, do it in float32."""
    update = experiment.gradients.update.method
    if update != "synchronous":
        yield Problem(field, f"{update} {why}", off)


def whole_replicas_only(experiment: Experiment, field: str, off: str, why: str) -> Iterator[Problem]:
    """Refuse layouts that spread a model over ranks."""
    layout = experiment.layout
    if layout.world_size != layout.dp_replicate:
        yield Problem(field, f"{why}, the layout is {layout}", off)


def tied_over_stages(experiment: Experiment, field: str, off: object) -> Iterator[Problem]:
    """Copies of a tied weight on two stages stay equal only if nothing about them is random."""
    if experiment.layout.pp > 1 and experiment.workload.options.get("tied"):
        reason = "copies of the tied weight on two stages would be rounded differently and drift apart (workload.tied)"
        yield Problem(field, reason, off)


def slow_without(
    experiment: Experiment, machine: Machine, field: str, flags: frozenset[str], what: str
) -> Iterator[Problem]:
    """A warning for CPUs that do without such instructions."""
    if experiment.launch.device == "cpu" and machine.cpu_flags and not machine.cpu_flags & flags:
        yield Problem(field, f"this CPU has no instructions for {what}: right, but slower than float32")
