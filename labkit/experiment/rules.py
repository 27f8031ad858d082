"""Rules for what can be combined, and for what this machine can run. One function per rule; each yields problems.

A rule names the field, the reason and the nearest legal value. Rules that belong to one method are defined in that
method's file (`problems(experiment, machine)` of its class) and are called from here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from labkit.experiment import own_methods
from labkit.experiment.cell_source import NotSelfContainedError, check
from labkit.experiment.layout import AXES
from labkit.experiment.locate import why_not
from labkit.experiment.machine import Machine
from labkit.experiment.no_effect import exchanges_gradients, host_count, options_without_effect
from labkit.experiment.problem import ExperimentError, Problem
from labkit.experiment.registry import Method, network_rules, registry
from labkit.experiment.schema import Experiment
from labkit.experiment.update_rule import SYNCHRONOUS, update_rule

Rule = Callable[[Experiment, Machine], Iterable[Problem]]

# Registry of each choice, and the field of the experiment that selects from it.
CHOICES = {
    "workload": "workload.name",
    "layout.schedule": "layout.schedule",
    "gradients.compression": "gradients.compression.method",
    "gradients.update": "gradients.update.method",
    "sparsity": "sparsity.method",
    "quantization.training": "quantization.training",
    "quantization.qat": "quantization.qat",
    "quantization.after_training": "quantization.after_training",
}

MAX_RANKS_PER_SLOT = 16


def problems(experiment: Experiment, machine: Machine | None = None) -> list[Problem]:
    """Return every reason why `experiment` cannot run on `machine`, in the order of the form."""
    machine = machine or Machine.here()
    try:
        resolved = experiment.resolve(machine)
    except ExperimentError as error:
        return error.problems
    return [problem for rule in RULES for problem in rule(resolved, machine)]


def warnings(experiment: Experiment, machine: Machine | None = None) -> list[Problem]:
    """Return what will run, but may not mean what the user expects."""
    machine = machine or Machine.here()
    try:
        resolved = experiment.resolve(machine)
    except ExperimentError:
        return []
    return [problem for rule in WARNINGS for problem in rule(resolved, machine)]


def own_methods_exist(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
    """Refuse own methods whose code is missing or broken, as far as that is visible without running it."""
    for knob, key in experiment.own_method_keys():
        if own_methods.loaded(knob, key) is None:
            reason = _why_no_class(key, experiment.code.get(key))
            if reason:
                yield Problem(CHOICES[knob], reason)


def _why_no_class(key: str, source: str | None) -> str:
    """Return why the class of an own method cannot be loaded on the ranks; empty if nothing speaks against it."""
    if not own_methods.from_cell(key):
        return why_not(key)
    name = own_methods.class_name(key)
    if source is None:
        return f"the experiment does not contain the source of {key}: define the class and call labkit.from_notebook"
    if own_methods.cell_key(name, source) != key:
        return f"the source of {key} in the experiment has been changed since the class was defined"
    try:
        check(source, name)
    except NotSelfContainedError as error:
        return str(error)
    return ""


def _methods_in_force(experiment: Experiment) -> Iterator[tuple[str, Method]]:
    """Yield field and method of each choice, without an update rule that an asynchronous schedule replaces."""
    replaced = "gradients.update" if experiment.layout.order.asynchronous else ""
    for knob, field in CHOICES.items():
        if knob != replaced:
            yield field, registry(knob)[experiment.get(field)]


def method_rules(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
    """Yield the problems that the chosen methods report themselves."""
    for _, method in _methods_in_force(experiment):
        yield from getattr(method.load(), "problems", _none)(experiment, machine)


def one_update_rule(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
    """Refuse an update rule that the pipeline schedule replaces with its own."""
    layout, method = experiment.layout, experiment.gradients.update.method
    if layout.order.asynchronous and method != SYNCHRONOUS:
        reason = f"the schedule {layout.order.name} has its own update rule, so it cannot be combined with {method}"
        yield Problem("gradients.update.method", reason, SYNCHRONOUS)


def emulated_network(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
    """Yield the reasons why `launch.network` cannot be emulated for this experiment or on this machine."""
    if experiment.launch.network is not None:
        yield from network_rules().problems(experiment, machine)


def network_warnings(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
    """Describe the emulated network, so that nobody mistakes it for a real one."""
    if experiment.launch.network is not None:
        yield from network_rules().warnings(experiment, machine)


def axis_rules(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
    """Yield the problems of the axes along which there is more than one rank."""
    axes = registry("layout.axes")
    for axis in AXES:
        if getattr(experiment.layout, axis) > 1:
            yield from getattr(axes[axis].load(), "problems", _none)(experiment, machine)


def batch_covers_ranks(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
    """Require at least one sample for every rank in every pass."""
    ranks, passes = experiment.layout.data_parallel, experiment.gradients.accumulation
    minimum = ranks * passes
    if experiment.training.global_batch < minimum:
        yield Problem(
            "training.global_batch",
            f"{ranks} data-parallel ranks × {passes} passes need at least {minimum} samples per update, "
            f"got {experiment.training.global_batch}",
            minimum,
        )


def device_exists(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
    """Refuse `cuda` on a machine without a usable GPU."""
    if experiment.launch.device == "cuda" and not machine.gpus:
        yield Problem("launch.device", f"no GPU can be used: {machine.gpu_reason}", "cpu")


def point_to_point_on_shared_gpus(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
    """Refuse layouts that send tensors between two ranks if ranks share a GPU."""
    ranks, gpus = experiment.layout.world_size, len(machine.gpus)
    if experiment.launch.device != "cuda" or not 0 < gpus < ranks:
        return
    # torch's gloo has no send and receive for tensors on GPUs, and NCCL refuses ranks that share one.
    reason = f"must send tensors from rank to rank, which {ranks} ranks that share {gpus} GPU(s) cannot do: use the CPU"
    if experiment.layout.pp > 1 or experiment.layout.cp > 1:
        axes = " and ".join(axis for axis in ("pp", "cp") if getattr(experiment.layout, axis) > 1)
        yield Problem("launch.device", f"{axes} {reason}", "cpu")
    update = experiment.gradients.update
    if update.method == "gossip" and getattr(update, "graph", "pairs") == "ring":
        yield Problem("launch.device", f"the ring of gossip {reason}", "cpu")


def compiled_blocks_are_whole(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
    """Refuse to compile blocks inside which ranks exchange activations."""
    layout = experiment.layout
    if experiment.launch.compile == "blocks" and layout.world_size > layout.dp_replicate * layout.dp_shard:
        reason = (
            "blocks can be compiled only under data parallelism and ZeRO: in other layouts, ranks exchange activations "
            "inside a block"
        )
        yield Problem("launch.compile", reason, "off")


def shared_memory_is_for_the_cpu(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
    """Refuse the shared-memory transport for gradients on GPUs."""
    if experiment.launch.transport == "shared_memory" and experiment.launch.device == "cuda":
        yield Problem("launch.transport", "gradients on GPUs cannot be exchanged through host memory", "auto")


def hierarchical_sums(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
    """Yield the reasons why gradients cannot be summed in two levels."""
    layout = experiment.layout
    if not experiment.gradients.hierarchical:
        return
    field, hosts = "gradients.hierarchical", host_count(experiment)
    if layout.world_size != layout.dp_replicate:
        yield Problem(field, "hierarchical reduction is defined only for plain data parallelism", "false")
    elif not exchanges_gradients(experiment):
        yield Problem(field, f"{update_rule(experiment).key} does not exchange gradients", "false")
    elif hosts < 2:
        yield Problem(field, "there is only one host (launch.network.hosts)", "false")
    elif layout.world_size % hosts:
        yield Problem(
            "layout", f"{hosts} hosts do not divide {layout.world_size} ranks", layout.world_size // hosts * hosts
        )


def shares_follow_speed(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
    """Yield the reasons why shares of the batch cannot follow the speed of the ranks."""
    if experiment.training.shares != "speed":
        return
    layout, field = experiment.layout, "training.shares"
    if layout.world_size != layout.dp_replicate:
        yield Problem(field, "only whole replicas can take shares of different sizes", "equal")
    if not update_rule(experiment).is_synchronous:
        reason = "samples have equal weight only if every update is synchronous"
        yield Problem(field, reason, "equal")
    if experiment.training.loader_workers:
        yield Problem("training.loader_workers", "loader processes prepare batches before their shares are known", 0)


def ranks_fit(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
    """Limit oversubscription, so that a typo does not bring down the machine."""
    slots = max(1, machine.slots(experiment.launch.device))
    maximum = slots * MAX_RANKS_PER_SLOT
    ranks = experiment.layout.world_size
    if ranks > maximum:
        what = "GPUs" if experiment.launch.device == "cuda" else "cores"
        yield Problem(
            "layout",
            f"{ranks} ranks are more than {MAX_RANKS_PER_SLOT} times the {slots} {what} of this machine",
            maximum,
        )


def profiled_step_exists(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
    """Refuse to profile a step after the last one; the steps of a run given in epochs are known on the ranks only."""
    step, steps = experiment.training.profile_step, experiment.training.steps
    if steps is not None and step > steps:
        yield Problem("training.profile_step", f"the run has only {steps} steps, so step {step} never comes", steps)


def isolated_is_data_parallel(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
    """Refuse independent copies for anything but plain data parallelism."""
    if experiment.launch.isolated and experiment.layout.world_size != experiment.layout.dp_replicate:
        yield Problem("launch.isolated", "independent copies are defined only for plain data parallelism", "false")


def slowed_ranks_exist(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
    """Refuse slowdowns of ranks that do not exist."""
    ranks = experiment.layout.world_size
    for rank in sorted(rank for rank in experiment.launch.slowdown if rank >= ranks):
        yield Problem("launch.slowdown", f"there is no rank {rank}: the {ranks} ranks are numbered from 0")


def eight_bit_state(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
    """Yield the reasons why the optimizer state cannot have 8 bits; most are parts that cannot read packed moments."""
    if experiment.optimizer.state_bits == 32:
        return
    field, update, layout = "optimizer.state_bits", update_rule(experiment), experiment.layout
    if experiment.optimizer.name != "adamw":
        yield Problem("optimizer.name", "only AdamW supports an optimizer state of 8 bits", "adamw")
    if experiment.quantization.training == "fp64":
        yield Problem(field, "a parity check in float64 does not use 8-bit moments", 32)
    if experiment.quantization.training == "fp16":
        yield Problem(field, "fp16 skips steps that overflow, which only the fused AdamW with 32-bit state can do", 32)
    if not update.is_synchronous:
        yield Problem(
            field, f"{update.key} averages or transfers the optimizer's moments, which 8 bits do not allow", 32
        )
    if experiment.sparsity.method != "none":
        yield Problem(
            field, "pruning clears the moments of single weights, but 8-bit moments come in blocks of 256", 32
        )
    compression = experiment.gradients.compression
    _, options = compression.load()
    if getattr(options, "freeze", False):
        yield Problem(field, f"{compression.method} uses its own AdamW, which has 32-bit state", 32)
    if layout.pp > 1 and experiment.workload.options.get("tied"):
        reason = "copies of the tied weight on two stages would be updated differently and drift apart (workload.tied)"
        yield Problem(field, reason, 32)


RULES: list[Rule] = [
    own_methods_exist,
    eight_bit_state,
    one_update_rule,
    method_rules,
    axis_rules,
    device_exists,
    point_to_point_on_shared_gpus,
    compiled_blocks_are_whole,
    shared_memory_is_for_the_cpu,
    hierarchical_sums,
    ranks_fit,
    batch_covers_ranks,
    shares_follow_speed,
    isolated_is_data_parallel,
    profiled_step_exists,
    emulated_network,
    slowed_ranks_exist,
]


def oversubscribed(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
    """Warn if there are more ranks than GPUs or more threads than cores."""
    device, ranks = experiment.launch.device, experiment.layout.world_size
    if device == "cuda" and 0 < len(machine.gpus) < ranks:
        yield Problem(
            "layout",
            f"{ranks} ranks share {len(machine.gpus)} GPU(s) over gloo: fine for checks, but speeds mean nothing",
        )
    threads = ranks * experiment.launch.threads_per_rank
    if device == "cpu" and threads > machine.cores:
        yield Problem("layout", f"oversubscribed: {threads} threads on {machine.cores} cores, so speeds mean nothing")


def method_warnings(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
    """Yield the warnings that the chosen methods report themselves."""
    for field, method in _methods_in_force(experiment):
        yield from getattr(method.load(), "warnings", _none)(experiment, machine)
        if not method.is_loaded:
            yield Problem(field, f"{method.key} is checked only on the ranks, because its code does not run before")


def _none(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
    """Report nothing: for methods without rules of their own."""
    return iter(())


def slow_on_purpose(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
    """Warn about ranks that are slowed down on purpose."""
    for rank, factor in sorted(experiment.launch.slowdown.items()):
        if factor > 1:
            yield Problem("launch.slowdown", f"rank {rank} is slowed down on purpose, by a factor of {factor:g}")


def profiled_step_is_plain(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
    """Warn if the step to be profiled is the one that labkit traces, which is not a step like all others."""
    step, traced = experiment.training.profile_step, experiment.training.trace_step
    if step and step == min(traced, experiment.training.steps or traced):
        reason = f"step {step} is also the traced step, so the profile shows labkit's probes and blocks uncompiled"
        yield Problem("training.profile_step", reason)


WARNINGS: list[Rule] = [
    oversubscribed,
    profiled_step_is_plain,
    options_without_effect,
    network_warnings,
    slow_on_purpose,
    method_warnings,
]

UNAVAILABLE: dict[str, Callable[[], str]] = {
    "launch.network": lambda: network_rules().possible().bucket,
    "launch.network.delay_ms": lambda: network_rules().possible().delay,
    "launch.network.hosts": lambda: network_rules().possible().hosts,
}
"""Fields that some machines cannot offer, with functions that return why this one cannot ("" if it can)."""
