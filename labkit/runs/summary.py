"""The summary of a finished run, made from its events and written to `summary.json` by its supervisor."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np

from labkit.experiment import Experiment
from labkit.experiment.run_directory import RunDirectory, write_json
from labkit.runs import kernels
from labkit.runs.checked import figure_or_words, number
from labkit.runs.compare import RunMeasurement, compare, find_baseline
from labkit.runs.data import RunData
from labkit.runs.pipeline import bubble_of, of_one_pipeline
from labkit.runs.straggler import straggler

LOSS_POINTS = 200


def write(directory: RunDirectory, state: str, baseline: str | None = "auto") -> dict[str, Any]:
    """Build the summary for a run that ends in `state`, write it, and return it."""
    summary = build(directory, state, baseline)
    write_json(directory.summary, summary)
    return summary


def build(directory: RunDirectory, state: str | None = None, baseline: str | None = "auto") -> dict[str, Any]:
    """The summary (keys: see README). `baseline` is a run id, "auto" for the latest that fits, or None."""
    one = RunMeasurement.read(directory)
    experiment, data, steady = one.experiment, one.data, one.steady
    ranks = experiment.layout.world_size
    base = None
    if ranks > 1 and baseline is not None:
        base = find_baseline(directory) if baseline == "auto" else RunDirectory.find(baseline)
    comparison = compare([directory], baseline=base)
    row = next(row for row in comparison.rows if row["run_id"] == directory.id)
    final = data.evaluations[-1][2] if data.evaluations else {}
    start = data.rank_starts[0] if data.rank_starts else {}
    told = one.status.get("notes")
    notes = [*(told if isinstance(told, list) else []), *row["notes"], *start.get("warnings", [])]
    behind = straggler(data)
    if behind is not None:
        notes = [*notes, str(behind)]
    diverged = np.flatnonzero(~np.isfinite(data.loss))
    if len(diverged):
        notes = [*notes, f"the loss is no finite number from step {data.first + int(diverged[0]) + 1} on"]
    broken = [name.replace("_", " ") for name, figure in final.items() if not math.isfinite(figure)]
    if broken:
        verb = "is" if len(broken) == 1 else "are"
        step = data.evaluations[-1][0]
        notes = [*notes, f"the held-out {' and '.join(broken)} after step {step} {verb} not finite"]
    return {
        "run_id": directory.id,
        "title": experiment.title,
        "workload": experiment.workload.name,
        "status": state or one.status["state"],
        "layout": str(experiment.layout),
        "world_size": ranks,
        "device": experiment.launch.device,
        "global_batch": experiment.training.global_batch,
        "steps": data.first + data.steps,
        "loss": _thinned(data.loss, data.first),
        "accuracy": number(final.get("accuracy")),
        "metrics": figure_or_words(final),
        "metric": data.metric,
        "facts": data.facts,
        "samples_per_second": None if steady.complaint else one.samples_per_second,
        "step_seconds": {
            "median": steady.median,
            "p10": steady.quantile(0.1),
            "p90": steady.quantile(0.9),
            "warmup_steps": steady.warmup_steps,
            "samples": len(steady.seconds),
        },
        "seconds": float(data.elapsed[-1]) if len(data.elapsed) else 0.0,
        "time_to_first_step_seconds": start.get("time_to_first_step_seconds"),
        "communication": _communication(data),
        "network": _network(data, experiment),
        "straggler": asdict(behind) if behind is not None else None,
        "memory": _memory(data, ranks),
        "bubble": _bubble(data, experiment),
        "staleness": _staleness(data),
        "experts": {name: _shares(load) for name, load in data.experts.items()},
        "peak_memory_bytes": [data.peak_memory.get(rank) for rank in range(ranks)],
        "parameters": start.get("parameters"),
        "effective": start.get("effective", {}) | _sparsity(data) | _multiplied(data),
        "quantized": figure_or_words(data.quantized) or None,
        "kernels": _kernels(data),
        "exported": figure_or_words(data.exported) or None,
        "baseline_run_id": row["baseline_run_id"] if ranks > 1 else None,
        "speedup": row["speedup"] if ranks > 1 else None,
        "speedup_interval": [row["speedup_low"], row["speedup_high"]] if ranks > 1 and row["speedup"] else None,
        "efficiency": row["efficiency"] if ranks > 1 else None,
        "ceiling": row["ceiling"],
        "notes": notes,
        "warnings": one.status.get("warnings", []),
    }


def _sparsity(data: RunData) -> dict[str, Any]:
    """What part of the weights that a method may make zero is zero, as counted after its last change."""
    if not data.sparsity:
        return {"sparsity": 0.0}
    layers = data.sparsity[-1][1].values()
    return {"sparsity": sum(zeros for zeros, _, _ in layers) / sum(size for _, size, _ in layers)}


def _multiplied(data: RunData) -> dict[str, Any]:
    """What layers multiply: inputs × weights, what most of them do first."""
    words = sorted(data.multiplied, key=lambda one: -data.multiplied[one])
    return {"multiplied": ", ".join(words)} if words else {}


def _kernels(data: RunData) -> dict[str, float | None] | None:
    """How many times as fast as dense float32 layers are in theory and as measured; None for runs that are that."""
    if not data.kernels:
        return None
    return {"theory": kernels.theory(data.kernels), "kernel": kernels.kernel(data.kernels)}


def _communication(data: RunData) -> dict[str, Any] | None:
    """Per update, the largest over the ranks; what all ranks together sent (counted_bytes_of_all_ranks); the method;
    and per axis, the largest again: calls, bytes, wire_bytes, exposed_seconds.
    """
    axes: dict[str, dict[str, float]] = {}
    for traffic in data.traffic.values():
        for axis, counts in traffic.items():
            known = axes.setdefault(axis, dict(counts))
            axes[axis] = {key: max(value, known[key]) for key, value in counts.items()}
            axes[axis] |= {key: int(axes[axis][key]) for key in ("calls", "bytes")}
    if not data.communication:
        return None
    together = {"counted_bytes_of_all_ranks": sum(data.counted.values())} if data.counted else {}
    method = {"method": data.compressor} if data.compressor else {}
    return {**data.communication, **together, **method, "axes": axes}


def _network(data: RunData, experiment: Experiment) -> dict[str, Any] | None:
    """The emulated network and what the kernel counted on it during the updates; None without one.

    bytes: what left over slow links, of all ranks together, with headers and acknowledgements; loopback_bytes: what
    stayed within hosts, where there are several; per_host: the same for each of them.
    """
    network = experiment.launch.network
    if network is None:
        return None
    found: dict[str, Any] = network.model_dump()
    if len(data.links) != network.hosts:
        return found  # it has not ended, or there was nobody to talk to
    hosts = [data.links[rank] for rank in sorted(data.links)]
    sent, updates = sum(int(host["bytes"]) for host in hosts), int(hosts[0]["updates"])
    return found | {
        "bytes": sent,
        "loopback_bytes": sum(int(host["loopback_bytes"]) for host in hosts),
        "per_host": [{key: int(host[key]) for key in ("bytes", "loopback_bytes")} for host in hosts],
        "updates": updates,
        "bytes_per_step": sent / updates if updates else None,
        "seconds": hosts[0]["seconds"],
    }


def _memory(data: RunData, ranks: int) -> dict[str, Any] | None:
    """Per rank, the bytes of the traced update beside those of the formula; None where nothing was traced."""
    if not data.memory:
        return None
    every = range(ranks)
    return {
        "step": data.traced,
        "measured": [data.memory.get(rank) for rank in every],
        "formula": [data.formula.get(rank) for rank in every],
    }


def _bubble(data: RunData, experiment: Experiment) -> dict[str, Any] | None:
    """Of the pipeline that rank 0 is in; None without one, or where its timeline is not whole."""
    timeline = of_one_pipeline(data.timeline, experiment.layout)
    if len(timeline) < 2 or len(timeline) != experiment.layout.pp:
        return None
    try:
        return asdict(bubble_of(timeline, experiment))
    except ValueError:
        return None


def _staleness(data: RunData) -> dict[str, Any] | None:
    """How old gradients were when they were used (updates); None where that is not measured."""
    counts = data.staleness
    if not counts.sum():
        return None
    age = np.arange(len(counts))
    mean = float((age * counts).sum() / counts.sum())
    return {"mean": mean, "max": int(age[counts > 0].max()), "histogram": counts.tolist()}


def _shares(load: np.ndarray[Any, np.dtype[np.int64]]) -> list[float]:
    """Which part of all choices fell on each expert."""
    return [float(part) for part in load / max(1, int(load.sum()))]


def _thinned(loss: np.ndarray[Any, np.dtype[np.float64]], first: int) -> list[list[float | int | None]]:
    """At most LOSS_POINTS pairs [step, loss]; a loss that is no number becomes null, because JSON has none."""
    if not len(loss):
        return []
    index = np.unique(np.linspace(0, len(loss) - 1, LOSS_POINTS).round().astype(int))
    return [[first + int(i) + 1, float(loss[i]) if math.isfinite(loss[i]) else None] for i in index]
