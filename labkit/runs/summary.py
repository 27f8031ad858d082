"""The summary of a run that has ended, as its supervisor writes it to `summary.json`: every key, its type and unit.

`summarize` builds it (summarize.py). A stored summary may come from another version or machine, so readers treat
it as a plain dict, in which keys may be missing or unknown.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

from labkit.runs.gpu_use import GpuUse
from labkit.runs.pipeline import Bubble
from labkit.runs.straggler import Straggler


@dataclass(frozen=True, kw_only=True)
class StepSeconds:
    """Time of an optimizer step after the warm-up (s)."""

    median: float | None
    """Median."""
    p10: float | None
    """10th percentile."""
    p90: float | None
    """90th percentile."""
    warmup_steps: int
    """Number of first steps that are left out."""
    samples: int
    """Number of steps measured."""


@dataclass(frozen=True, kw_only=True)
class TracedMemory:
    """Memory of each rank in the traced step (bytes), by `parameters`, `gradients`, `optimizer` and `activations`."""

    step: int | None
    """The traced step, counted from 1."""
    measured: list[dict[str, int] | None]
    """By rank, measured; null for a rank that wrote no trace."""
    formula: list[dict[str, int] | None]
    """By rank, according to the formulas of the layout, without activations."""


@dataclass(frozen=True, kw_only=True)
class Staleness:
    """Age of gradients when they were used (optimizer steps), over all ranks."""

    mean: float
    """Mean."""
    max: int
    """Largest."""
    histogram: list[int]
    """How many gradients were 0, 1, 2, … steps old."""


@dataclass(frozen=True, kw_only=True)
class KernelSpeedup:
    """Speed-up of a sparse or low-precision network's layers over dense float32."""

    theory: float | None
    """In theory, by the operations and bytes that the layers need."""
    kernel: float | None
    """Measured layer by layer."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run did and how fast. Null means that a figure was not measured or does not apply."""

    run_id: str
    """Id of the run."""
    title: str
    """Title of the experiment."""
    workload: str
    """Workload of the run: `vision`, `language`, `driving` or `custom`."""
    status: str
    """How the run ended: `finished`, `stopped` or `failed`."""
    layout: str
    """Layout in short form, such as `dp2·tp2`."""
    world_size: int
    """Number of ranks."""
    device: str
    """Device as in the experiment: `cpu` or `cuda`."""
    global_batch: int
    """Samples per optimizer step over all ranks."""
    steps: int
    """Optimizer steps, including those before a resume."""
    loss: list[list[float | int | None]]
    """Pairs [step, training loss], at most 200 of them; a loss that is not finite is null."""
    accuracy: float | None
    """Held-out accuracy of the last evaluation."""
    metrics: dict[str, float | str]
    """Held-out metrics of the last evaluation by key; a metric that is not finite is a word."""
    metric: dict[str, Any]
    """The main metric: `key`, `title`, `higher_is_better` and `unit`; empty if the task has not reported it."""
    facts: dict[str, Any]
    """What the task reports about its data: counts, files, columns, classes."""
    samples_per_second: float | None
    """Median throughput over all ranks after the warm-up; null if there were too few steps."""
    model_flops_per_sample: float | None
    """Model FLOPs of one sample: 3 × the products of one forward pass of the whole model, without what is recomputed;
    null if they are not known (`notes` gives the reason)."""
    model_flops_per_second: float | None
    """Median model FLOPs per second over all ranks after the warm-up."""
    mfu: float | None
    """Model FLOPs utilisation: model FLOPs per second divided by `peak_flops_per_second`; null on CPUs and if that is
    not known."""
    peak_flops_per_second: float | None
    """Peak rate of the run's distinct GPUs together for dense products in the number format that trains, from NVIDIA's
    data sheets; null on CPUs and if it is not known."""
    peak_of: str | None
    """The GPUs and the number format to which that peak refers, such as `2 × NVIDIA H200, bf16`; null on CPUs."""
    step_seconds: StepSeconds
    """Time of an optimizer step after the warm-up (s)."""
    seconds: float
    """Duration of the training (s)."""
    time_to_first_step_seconds: float | None
    """Time from the request to the end of the first step (s)."""
    communication: dict[str, Any] | None
    """Per optimizer step, the maximum over the ranks: `bytes_per_step` on the wire, `exposed_seconds_per_step`, and for
    combining gradients `counted_bytes_per_step`, `formula_bytes_per_step` and `compression_seconds`. Also
    `counted_bytes_of_all_ranks`; `method`, the compressor; and `axes`: per axis `calls`, `bytes`, `wire_bytes` and
    `exposed_seconds`."""
    network: dict[str, Any] | None
    """The emulated network as in the experiment, and what the Linux kernel counted on it: `bytes` over slow links by
    all ranks together, `loopback_bytes` within hosts, both `per_host`, `updates`, `bytes_per_step` and `seconds`."""
    straggler: Straggler | None
    """The rank that takes clearly longer to compute than the others."""
    memory: TracedMemory | None
    """Memory of each rank in the traced step (bytes); null if no step was traced."""
    bubble: Bubble | None
    """Share of the traced step in which the ranks of the first pipeline did not compute."""
    staleness: Staleness | None
    """Age of gradients when they were used (optimizer steps)."""
    experts: dict[str, list[float]]
    """By block, the share of all routed tokens that each expert got."""
    peak_memory_bytes: list[int | None]
    """Peak memory of each rank (bytes): on its GPU, or of its process if it runs on a CPU."""
    start_memory_bytes: list[int | None]
    """Peak host memory of each rank's process before step 1, while it built, tried and sharded the model (bytes)."""
    gpus: list[GpuUse]
    """How each GPU of the run was used, as NVML reports it; empty on the CPU, and without the package nvidia-ml-py."""
    parameters: int | None
    """Number of parameters of the model."""
    effective: dict[str, Any]
    """What took effect, as measured: dtypes, kernels, backends, compiled blocks, and `sparsity`, the share of the
    prunable weights that are zero."""
    quantized: dict[str, Any] | None
    """The trained network compared with its quantized copy."""
    kernels: KernelSpeedup | None
    """Speed-up of the network's layers over dense float32; null for dense runs in full precision."""
    exported: dict[str, Any] | None
    """The trained sparse network compared in several forms."""
    baseline_run_id: str | None
    """The run with one process to which the speed-up refers."""
    speedup: float | None
    """Throughput divided by that of the baseline; null if no speed-up can be claimed (`notes` gives the reason)."""
    speedup_interval: list[float | None] | None
    """The 95 % interval of the speed-up, [low, high] (moving-block bootstrap)."""
    efficiency: float | None
    """Speed-up divided by the number of ranks."""
    ceiling: float | None
    """Speed-up of as many independent copies on this machine: the most that the machine can give."""
    notes: list[str]
    """What readers of the figures must know, one sentence each."""
    warnings: list[str]
    """Warnings about the experiment, from the rules."""

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as a dict of JSON values, as it is stored."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: _as_json(value) for name, value in values.items()}


def _as_json(value: Any) -> Any:
    """Return a dataclass as a dict, and dataclasses in a list as dicts; anything else as it is."""
    if isinstance(value, list):
        return [_as_json(item) for item in value]
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
