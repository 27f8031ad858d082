"""Options that have no effect in an experiment, so that whoever has set one is warned."""

from __future__ import annotations

from collections.abc import Iterator

from labkit.experiment.layout import Layout
from labkit.experiment.machine import Machine
from labkit.experiment.problem import Problem
from labkit.experiment.registry import registry
from labkit.experiment.schema import Experiment
from labkit.experiment.update_rule import update_rule


def options_without_effect(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
    """Warn about every option that has no effect in this experiment."""
    layout = experiment.layout
    if layout.pp == 1:
        for name in ("microbatches", "stages_per_rank", "balance", "stage_blocks"):
            if getattr(layout, name) != Layout.model_fields[name].default:
                yield Problem(f"layout.{name}", "has no effect without pipeline stages (layout.pp is 1)")
    elif layout.microbatches_per_pass != layout.microbatches:
        yield Problem("layout.microbatches", f"has no effect: the {layout.order.name} schedule has a single microbatch")
    if not layout.order.asynchronous:
        for name in ("weight_stashing", "weight_prediction"):
            if getattr(layout, name) != Layout.model_fields[name].default:
                reason = (
                    f"has no effect: the {layout.order.name} schedule keeps no old weights, because its stages wait"
                )
                yield Problem(f"layout.{name}", reason)
    if experiment.launch.transport == "shared_memory" and layout.world_size != layout.dp_replicate:
        yield Problem("launch.transport", "has no effect: only plain data parallelism uses shared memory")
    if not experiment.gradients.overlap and (why := _never_overlaps(experiment)):
        yield Problem("gradients.overlap", f"has no effect: {why}")
    if experiment.gradients.hierarchical and layout.world_size == host_count(experiment):
        yield Problem("gradients.hierarchical", "has no effect: every host has only one rank")
    if layout.cpu_offload and (experiment.launch.device == "cpu" or layout.dp_shard == 1):
        on_cpu = experiment.launch.device == "cpu"
        why = "everything is already in host memory" if on_cpu else "nothing is sharded (layout.dp_shard is 1)"
        yield Problem("layout.cpu_offload", f"has no effect: {why}")
    if layout.sequence_parallel and layout.tp == 1:
        yield Problem("layout.sequence_parallel", "has no effect without tensor parallelism (layout.tp is 1)")
    optimizer = experiment.optimizer
    of_others = {"adamw": ("momentum",), "sgd": ("beta1", "beta2", "eps")}[optimizer.name]
    for name in of_others:
        if getattr(optimizer, name) != type(optimizer).model_fields[name].default:
            yield Problem(f"optimizer.{name}", f"has no effect with {optimizer.name}")
    quantization = experiment.quantization
    if quantization.training != "int8":
        for name in ("rounding", "weight_gradient"):
            if getattr(quantization, name) != type(quantization).model_fields[name].default:
                yield Problem(f"quantization.{name}", "has no effect: only int8 training rounds gradients to 8 bits")
    if quantization.qat_start and quantization.qat == "none":
        yield Problem("quantization.qat_start", "has no effect without quantization.qat")
    usual = type(quantization).model_fields["calibration"].default
    if quantization.calibration != usual and quantization.after_training != "int8_static":
        yield Problem("quantization.calibration", "has no effect: only int8_static (after_training) is calibrated")
    of_layers = registry("quantization.training")[quantization.training].load().layers_from == "labkit"
    if quantization.head and not (of_layers or quantization.qat != "none" or quantization.after_training != "none"):
        yield Problem("quantization.head", "has no effect: no number format for linear layers is chosen")
    if experiment.sparsity.method == "none" and experiment.sparsity.target > 0:
        yield Problem("sparsity.target", "has no effect while sparsity.method is none")
    if experiment.training.shares == "speed" and (layout.world_size == 1 or experiment.launch.isolated):
        yield Problem("training.shares", "has no effect where ranks do not share batches")
    if layout.world_size == 1 and experiment.launch.isolated:
        yield Problem("launch.isolated", "has no effect on one rank")
    steps = experiment.training.steps
    if steps is not None and experiment.optimizer.warmup_steps >= steps:
        yield Problem("optimizer.warmup_steps", f"the learning rate does not reach its peak in {steps} steps")


def _never_overlaps(experiment: Experiment) -> str | None:
    """Return why gradients are never exchanged during computation; None if they may be."""
    layout, launch = experiment.layout, experiment.launch
    if layout.world_size == 1 or launch.isolated or not exchanges_gradients(experiment):
        return "no gradients are exchanged"
    if layout.pp > 1:
        return "a pipeline exchanges gradients after its schedule has finished"
    if layout.dp_shard > 1 and layout.zero_stage == 3:
        return "torch's fully_shard decides when it exchanges gradients"
    compressed = experiment.gradients.compression.key != "none" or experiment.gradients.hierarchical
    by_network = launch.transport == "network" or launch.network is not None or launch.device == "cuda" or compressed
    if layout.world_size == layout.dp_replicate and not by_network:
        return "shared memory never exchanges gradients during computation (launch.transport)"
    return None


def exchanges_gradients(experiment: Experiment) -> bool:
    """Return whether gradients are exchanged, rather than the replicas being combined in another way."""
    rule, _ = update_rule(experiment).load()
    return bool(rule.uses_ddp)


def host_count(experiment: Experiment) -> int:
    """Return the number of emulated hosts."""
    return getattr(experiment.launch.network, "hosts", 1)
