"""Summaries of runs, built from their events and compared with their baselines."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from labkit.experiment import Experiment
from labkit.experiment.run_directory import RunDirectory
from labkit.runs import kernels
from labkit.runs.checked import figure_or_words, number
from labkit.runs.compare import RunMeasurement, compare, find_baseline
from labkit.runs.data import RunData
from labkit.runs.gpu_use import gpu_uses
from labkit.runs.gpu_warnings import gpu_warnings
from labkit.runs.model_flops import peak_of, why_no_mfu
from labkit.runs.pipeline import Bubble, bubble_of, first_pipeline
from labkit.runs.straggler import straggler
from labkit.runs.summary import KernelSpeedup, Staleness, StepSeconds, Summary, TracedMemory

LOSS_POINTS = 200
"""Maximum number of points of the loss curve in the summary."""


def summarize(directory: RunDirectory, state: str | None = None, baseline: str | None = "auto") -> Summary:
    """Return the summary of a run.

    `state`: in which it ends, if its status does not have that yet; `baseline`: a run id, "auto" for the latest run
    that fits, or None.
    """
    measurement = RunMeasurement.read(directory)
    experiment, data, steady = measurement.experiment, measurement.data, measurement.steady
    ranks = experiment.layout.world_size
    reference = None
    if ranks > 1 and baseline is not None:
        reference = find_baseline(directory) if baseline == "auto" else RunDirectory.find(baseline)
    comparison = compare([directory], baseline=reference)
    row = next(row for row in comparison.rows if row.run_id == directory.id)
    final = data.evaluations[-1][2] if data.evaluations else {}
    start = data.rank_starts[0] if data.rank_starts else {}
    status_notes = measurement.status.get("notes")
    notes = [*(status_notes if isinstance(status_notes, list) else []), *row.notes, *start.get("warnings", [])]
    flops = measurement.model_flops
    if missing := why_no_mfu(flops):
        notes = [*notes, missing]
    slowest = straggler(data)
    if slowest is not None:
        notes = [*notes, str(slowest)]
    diverged = np.flatnonzero(~np.isfinite(data.loss))
    if len(diverged):
        notes = [*notes, f"the loss became NaN or infinite at step {data.first + int(diverged[0]) + 1}"]
    not_finite = [name.replace("_", " ") for name, figure in final.items() if not math.isfinite(figure)]
    if not_finite:
        verb = "is" if len(not_finite) == 1 else "are"
        step = data.evaluations[-1][0]
        notes = [*notes, f"the held-out {' and '.join(not_finite)} after step {step} {verb} not finite"]
    gpus = gpu_uses(data)
    notes = [*notes, *([data.gpu_reason] if data.gpu_reason else []), *gpu_warnings(gpus)]
    return Summary(
        run_id=directory.id,
        title=experiment.title,
        workload=experiment.workload.name,
        status=state or measurement.status["state"],
        layout=str(experiment.layout),
        world_size=ranks,
        device=experiment.launch.device,
        global_batch=experiment.training.global_batch,
        steps=data.first + data.steps,
        loss=_sampled_loss(data.loss, data.first),
        accuracy=number(final.get("accuracy")),
        metrics=figure_or_words(final),
        metric=data.metric,
        facts=data.facts,
        samples_per_second=None if steady.reason else measurement.samples_per_second,
        model_flops_per_sample=flops.per_sample,
        model_flops_per_second=flops.per_second,
        mfu=flops.mfu,
        peak_flops_per_second=flops.peak_flops,
        peak_of=peak_of(flops),
        step_seconds=StepSeconds(
            median=steady.median,
            p10=steady.quantile(0.1),
            p90=steady.quantile(0.9),
            warmup_steps=steady.warmup_steps,
            samples=len(steady.seconds),
        ),
        seconds=float(data.elapsed[-1]) if len(data.elapsed) else 0.0,
        time_to_first_step_seconds=start.get("time_to_first_step_seconds"),
        communication=_communication(data),
        network=_network(data, experiment),
        straggler=slowest,
        memory=_memory(data, ranks),
        bubble=_bubble(data, experiment),
        staleness=_staleness(data),
        experts={name: _fractions(load) for name, load in data.experts.items()},
        peak_memory_bytes=[data.peak_memory.get(rank) for rank in range(ranks)],
        start_memory_bytes=[rank_start.get("host_bytes") for rank_start in data.rank_starts],
        gpus=gpus,
        parameters=start.get("parameters"),
        effective=start.get("effective", {}) | _sparsity(data) | _multiplied(data),
        quantized=figure_or_words(data.quantized) or None,
        kernels=_kernels(data),
        exported=figure_or_words(data.exported) or None,
        baseline_run_id=row.baseline_run_id if ranks > 1 else None,
        speedup=row.speedup if ranks > 1 else None,
        speedup_interval=[row.speedup_low, row.speedup_high] if ranks > 1 and row.speedup else None,
        efficiency=row.efficiency if ranks > 1 else None,
        ceiling=row.ceiling,
        notes=notes,
        warnings=measurement.status.get("warnings", []),
    )


def _sparsity(data: RunData) -> dict[str, Any]:
    """Return the fraction of the prunable weights that is zero, counted after the last change of the masks."""
    if not data.sparsity:
        return {"sparsity": 0.0}
    layers = data.sparsity[-1][1].values()
    return {"sparsity": sum(zeros for zeros, _, _ in layers) / sum(size for _, size, _ in layers)}


def _multiplied(data: RunData) -> dict[str, Any]:
    """Return what layers multiply (inputs × weights), the most frequent first."""
    operands_by_count = sorted(data.multiplied, key=lambda operands: -data.multiplied[operands])
    return {"multiplied": ", ".join(operands_by_count)} if operands_by_count else {}


def _kernels(data: RunData) -> KernelSpeedup | None:
    """Return the speed-up of layers over dense float32 in theory and as measured; None for dense float32 runs."""
    if not data.kernels:
        return None
    return KernelSpeedup(theory=kernels.theory(data.kernels), kernel=kernels.kernel(data.kernels))


def _communication(data: RunData) -> dict[str, Any] | None:
    """Return the communication per optimizer step, the largest over the ranks, and the method.

    counted_bytes_of_all_ranks is what all ranks together sent; axes has, per axis and again the largest over the ranks,
    calls, bytes, wire_bytes and exposed_seconds.
    """
    axes: dict[str, dict[str, float]] = {}
    for traffic in data.traffic.values():
        for axis, counts in traffic.items():
            largest = axes.setdefault(axis, dict(counts))
            axes[axis] = {key: max(value, largest[key]) for key, value in counts.items()}
            axes[axis] |= {key: int(axes[axis][key]) for key in ("calls", "bytes")}
    if not data.communication:
        return None
    total = {"counted_bytes_of_all_ranks": sum(data.counted.values())} if data.counted else {}
    method = {"method": data.compressor} if data.compressor else {}
    return {**data.communication, **total, **method, "axes": axes}


def _network(data: RunData, experiment: Experiment) -> dict[str, Any] | None:
    """Return the emulated network and what the kernel counted on it during training; None without one.

    bytes: sent over slow links by all ranks together, with headers and acknowledgements; loopback_bytes: sent within
    hosts, if there are several; per_host: both for each host.
    """
    network = experiment.launch.network
    if network is None:
        return None
    description: dict[str, Any] = network.model_dump()
    if len(data.links) != network.hosts:
        return description  # the run has not ended, or its single rank sends nothing
    hosts = [data.links[rank] for rank in sorted(data.links)]
    sent, updates = sum(int(host["bytes"]) for host in hosts), int(hosts[0]["updates"])
    return description | {
        "bytes": sent,
        "loopback_bytes": sum(int(host["loopback_bytes"]) for host in hosts),
        "per_host": [{key: int(host[key]) for key in ("bytes", "loopback_bytes")} for host in hosts],
        "updates": updates,
        "bytes_per_step": sent / updates if updates else None,
        "seconds": hosts[0]["seconds"],
    }


def _memory(data: RunData, ranks: int) -> TracedMemory | None:
    """Return per rank the bytes measured in the traced step and those by formula; None if no step was traced."""
    if not data.memory:
        return None
    all_ranks = range(ranks)
    return TracedMemory(
        step=data.traced,
        measured=[data.memory.get(rank) for rank in all_ranks],
        formula=[data.formula.get(rank) for rank in all_ranks],
    )


def _bubble(data: RunData, experiment: Experiment) -> Bubble | None:
    """Return the bubble of the pipeline that rank 0 belongs to; None without one or if its timeline is incomplete."""
    timeline = first_pipeline(data.timeline, experiment.layout)
    if len(timeline) < 2 or len(timeline) != experiment.layout.pp:
        return None
    try:
        return bubble_of(timeline, experiment)
    except ValueError:
        return None


def _staleness(data: RunData) -> Staleness | None:
    """Return how old gradients were when they were used (optimizer steps); None if that was not measured."""
    counts = data.staleness
    if not counts.sum():
        return None
    age = np.arange(len(counts))
    mean = float((age * counts).sum() / counts.sum())
    return Staleness(mean=mean, max=int(age[counts > 0].max()), histogram=counts.tolist())


def _fractions(load: np.ndarray[Any, np.dtype[np.int64]]) -> list[float]:
    """Return the fraction of all routed tokens that each expert got."""
    return [float(part) for part in load / max(1, int(load.sum()))]


def _sampled_loss(loss: np.ndarray[Any, np.dtype[np.float64]], first: int) -> list[list[float | int | None]]:
    """Return at most LOSS_POINTS pairs [step, loss]; a loss that is not finite becomes null, because JSON lacks NaN."""
    if not len(loss):
        return []
    index = np.unique(np.linspace(0, len(loss) - 1, LOSS_POINTS).round().astype(int))
    return [[first + int(i) + 1, float(loss[i]) if math.isfinite(loss[i]) else None] for i in index]
