"""Handlers of the events of a run: they add an event to the data; one function per name of the vocabulary.

The files are untrusted. A handler gets the fields that are of their declared kinds (`checked_fields`), so it checks
structures only; every count is bounded, and an event that cannot be read is rejected as a whole (False).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from labkit.experiment.after_training import FORMS
from labkit.experiment.events import MAX_STEPS
from labkit.experiment.memory import KINDS
from labkit.runs import kernels as layer_kernels
from labkit.runs import numbers as layer_numbers
from labkit.runs.checked import between, figure, figures, integer, number
from labkit.runs.pipeline import Action
from labkit.runs.reader import MAX_RANKS
from labkit.runs.steps import MAX_EVENTS

if TYPE_CHECKING:
    from labkit.runs.data import RunData

MAX_ACTIONS = 200_000
"""Maximum number of actions that are kept, over all timelines."""
MAX_AXES, MAX_BLOCKS, MAX_EXPERTS = 64, 1024, 1024
MAX_LAYERS = 64
"""Maximum number of layer records per rank; sixteen times as many over all ranks."""
MAX_EFFECTIVE, MAX_SIZES = 50, 16
TRAFFIC = ("calls", "bytes", "wire_bytes", "exposed_seconds")
LINK = ("bytes", "loopback_bytes", "seconds", "updates")
COMPARED = ("float", "quantized")
_COMMUNICATION = (
    "bytes_per_step",
    "exposed_seconds_per_step",
    "counted_bytes_per_step",
    "formula_bytes_per_step",
    "compression_seconds",
)
_AXIS = re.compile(r"[a-z_]{1,20}(\+[a-z_]{1,20}){0,7}")


def start(data: RunData, rank: int, event: dict[str, Any]) -> bool:
    """Take in what a rank reports when it is ready; rank 0 also reports the facts and the metric of the task."""
    data.set_first(event.get("first"))
    data.rank_starts[rank].update(
        device=event.get("device", ""),
        card=event.get("card", ""),
        pid=event.get("pid"),
        threads=event.get("threads"),
        parameters=event.get("parameters"),
        steps=event.get("steps"),
        host_bytes=event.get("host_bytes"),
        time_to_first_step_seconds=None,
        effective=event.get("effective", {}),
        warnings=event.get("warnings", []),
    )
    if rank == 0:
        if isinstance(event.get("facts"), dict):
            data.facts = event["facts"]
        metric = event.get("metric")
        if isinstance(metric, dict) and isinstance(metric.get("key"), str):
            data.metric = {
                "key": metric["key"][:100],
                "title": str(metric.get("title") or metric["key"])[:200],
                "higher_is_better": bool(metric.get("higher_is_better", True)),
                "unit": str(metric.get("unit") or "")[:40],
            }
    return True


def first_step(data: RunData, rank: int, event: dict[str, Any]) -> bool:
    """Take in the time from the request to the end of the first step (s)."""
    data.rank_starts[rank]["time_to_first_step_seconds"] = event.get("seconds")
    return True


def rehearsal(data: RunData, rank: int, event: dict[str, Any]) -> bool:
    """Take in the duration of the rehearsal before step 1 (s); its findings are among the run's warnings."""
    if "seconds" in event:
        data.rehearsal_seconds[rank] = event["seconds"]
    if rank == 0:
        data.model_flops_per_sample = event.get("model_flops_per_sample") or None
    return rank in data.rehearsal_seconds


def steps(data: RunData, rank: int, event: dict[str, Any]) -> bool:
    """Take in a batch of steps, column by column."""
    return data.add_steps(rank, event)


def evaluation(data: RunData, rank: int, event: dict[str, Any]) -> bool:
    """Take in held-out metrics."""
    step, metrics = event.get("step"), event.get("metrics")
    if step is None or metrics is None or len(data.evaluations) >= MAX_EVENTS:
        return False
    data.add_pause(rank, event)
    data.evaluations.append((step, data.seconds_since_start(event.get("monotonic")), metrics))
    return True


def checkpoint(data: RunData, rank: int, event: dict[str, Any]) -> bool:
    """Take in how long a checkpoint took."""
    data.add_pause(rank, event)
    return True


def end(data: RunData, rank: int, event: dict[str, Any]) -> bool:
    """Take in why a rank ended."""
    data.set_end(rank, event.get("reason") or "finished")
    return True


def sparsity(data: RunData, rank: int, event: dict[str, Any]) -> bool:
    """Take in the zeros of each weight after a change of the masks (rank 0)."""
    step, layers = event.get("step"), event.get("layers")
    if rank or step is None or not isinstance(layers, dict) or len(data.sparsity) >= MAX_EVENTS:
        return False
    zeros_by_weight: dict[str, tuple[int, int, float]] = {}
    for name, counts in list(layers.items())[:MAX_BLOCKS]:
        if not isinstance(counts, list) or len(counts) != 3:
            return False
        size, churn = integer(counts[1], 1, 2**62), number(counts[2])
        zeros = integer(counts[0], 0, size or 0)
        if size is None or zeros is None or churn is None:
            return False
        zeros_by_weight[str(name)[:200]] = (zeros, size, min(max(churn, 0.0), 1.0))
    if zeros_by_weight:
        data.sparsity.append((step, zeros_by_weight))
    return bool(zeros_by_weight)


def communication(data: RunData, rank: int, event: dict[str, Any]) -> bool:
    """Take in bytes and exposed time of communication per step; the largest over the ranks counts."""
    reported = {key: event.get(key) for key in _COMMUNICATION}
    largest = data.communication or {}
    for key, value in reported.items():
        if value is not None:
            largest[key] = max(value, largest.get(key, 0.0))
    data.communication = largest or None
    counted = reported["counted_bytes_per_step"]
    if counted is not None:
        data.counted[rank] = counted
    data.compressor = event.get("method", data.compressor)
    axes = _axes(event.get("axes"))
    if axes:
        data.traffic[rank] = axes
    return bool(largest)


def trace(data: RunData, rank: int, event: dict[str, Any]) -> bool:
    """Take in the memory, traffic, timeline and expert load of a rank's traced step."""
    step = event.get("step")
    if step is None or rank in data.memory:
        return False
    measured, formula = (_sizes(event.get(name)) for name in ("memory", "formula"))
    if measured is None or formula is None:
        return False
    data.traced, data.memory[rank], data.formula[rank] = step, measured, formula
    axes = _axes(event.get("traffic"))
    if axes:
        data.traffic[rank] = axes
    rows = event.get("timeline")
    room = MAX_ACTIONS - sum(map(len, data.timeline.values()))
    actions = [action for row in rows[:room] if (action := _action(row))] if isinstance(rows, list) else []
    if actions:
        data.timeline[rank] = sorted(actions, key=lambda action: action.begin)
    loads = event.get("experts")
    for name, counts in list(loads.items())[:MAX_BLOCKS] if isinstance(loads, dict) else ():
        _add_load(data, str(name)[:100], counts)
    return True


def profile(data: RunData, rank: int, event: dict[str, Any]) -> bool:
    """Take in which step a rank profiled, or why it could not."""
    if "step" not in event or rank in data.profiles:
        return False
    data.profiles[rank] = {key: event.get(key) for key in ("step", "seconds", "bytes", "busy_seconds", "note")}
    return True


def _add_load(data: RunData, block: str, counts: Any) -> None:
    """Add the tokens that each expert of a block got on one rank."""
    if not isinstance(counts, list) or not 0 < len(counts) <= MAX_EXPERTS:
        return
    checked = [integer(count, 0, 2**40) for count in counts]
    before = data.experts.get(block)
    if None in checked or (before is not None and len(before) != len(checked)) or len(data.experts) >= MAX_BLOCKS:
        return
    load = np.array(checked, dtype=np.int64)
    data.experts[block] = load if before is None else before + load


def link(data: RunData, rank: int, event: dict[str, Any]) -> bool:
    """Take in what the kernel counted on the emulated network."""
    if all(key in event for key in LINK):
        data.links[rank] = {key: event[key] for key in LINK}
    return rank in data.links


def effective(data: RunData, rank: int, event: dict[str, Any]) -> bool:
    """Take in the effective settings, as measured after the training."""
    measured, start = event.get("found", {}), data.rank_starts[rank]
    start["effective"] = dict(list((start.get("effective", {}) | measured).items())[:MAX_EFFECTIVE])
    return bool(measured)


def quantized(data: RunData, rank: int, event: dict[str, Any]) -> bool:
    """Take in the comparison of the trained network with its quantized copy (rank 0)."""
    result: dict[str, Any] = {name: event.get(name, "") for name in ("method", "qat")}
    result |= {name: event.get(name) for name in ("layers", "samples", "seconds")}
    result |= {name: _pair(event.get(name)) for name in ("bytes", "layer_bytes")}
    metrics, latency = event.get("metrics"), event.get("latency_seconds")
    if rank or data.quantized or not isinstance(metrics, dict) or not isinstance(latency, dict):
        return False
    result["metrics"] = {name: _figures(metrics.get(name), figure) for name in COMPARED}
    sizes = [(_size(size), _pair(both)) for size, both in list(latency.items())[:MAX_SIZES]]
    result["latency_seconds"] = {size: both for size, both in sizes if size is not None and both}
    rows = event.get("sensitivity")
    result["sensitivity"] = [
        (str(row[0])[:200], number(row[1]))
        for row in (rows[:MAX_BLOCKS] if isinstance(rows, list) else ())
        if isinstance(row, list) and len(row) == 2
    ]
    data.quantized = result
    return True


def numbers(data: RunData, rank: int, event: dict[str, Any]) -> bool:
    """Take in the operands of the layers of a stage in the last evaluation."""
    layers = layer_numbers.read(event.get("layers"), min(MAX_LAYERS, 16 * MAX_LAYERS - len(data.numbers)))
    names = {layer.name for layer in data.numbers}
    layers = [layer for layer in layers if layer.name not in names]
    if not layers:
        return False
    data.numbers = sorted([*data.numbers, *layers], key=lambda layer: layer.stage)
    counts = event.get("multiplied")
    for operands, count in list(counts.items())[:MAX_EFFECTIVE] if isinstance(counts, dict) else ():
        checked = integer(count, 1, 2**20)
        if checked is not None and len(data.multiplied) < MAX_EFFECTIVE:
            data.multiplied[operands[:100]] = data.multiplied.get(operands[:100], 0) + checked
    return True


def kernels(data: RunData, rank: int, event: dict[str, Any]) -> bool:
    """Take in the time of each kind of layer next to a dense one (rank 0)."""
    kinds = layer_kernels.read(event.get("kinds"))
    if rank or data.kernels or not kinds:
        return False
    data.kernels, data.without_kernel = kinds, event.get("left_out", 0)
    return True


def exported(data: RunData, rank: int, event: dict[str, Any]) -> bool:
    """Take in the comparison of the sparse network's forms (rank 0)."""
    metrics, latency = event.get("metrics"), event.get("latency_seconds")
    if rank or data.exported or not isinstance(metrics, dict) or not isinstance(latency, dict):
        return False
    result: dict[str, Any] = {name: event.get(name) for name in ("samples", "file_bytes", "seconds")}
    result["saved"] = event["saved"] if event.get("saved") in FORMS else ""
    result["metrics"] = {form: _figures(metrics[form], figure) for form in FORMS if form in metrics}
    result["bytes"] = _by_form(event.get("bytes"))
    result["layers"] = {form: int(count) for form, count in _by_form(event.get("layers")).items()}
    sizes = [(_size(size), _by_form(seconds)) for size, seconds in list(latency.items())[:MAX_SIZES]]
    result["latency_seconds"] = {size: seconds for size, seconds in sizes if size is not None and seconds}
    result["fastest"] = {size: min(seconds, key=seconds.__getitem__) for size, seconds in sizes if size and seconds}
    result["csr_layers"] = {
        at: int(count) for size, count in _figures(event.get("csr_layers")).items() if (at := _size(size))
    }
    data.exported = result
    return True


def memory(data: RunData, rank: int, event: dict[str, Any]) -> bool:
    """Take in the peak memory of a rank."""
    peak = event.get("peak_bytes")
    if peak is not None:
        data.peak_memory[rank] = max(peak, data.peak_memory.get(rank, 0))
    return peak is not None


def error(data: RunData, rank: int, event: dict[str, Any]) -> bool:
    """Take in the exception that ended a rank."""
    if len(data.errors) >= MAX_RANKS:
        return False
    data.errors.append({"rank": rank} | {key: event.get(key, "") for key in ("type", "message", "traceback")})
    return True


def _sizes(value: Any) -> dict[str, int] | None:
    """Return bytes by kind of memory; None if it is not a dict."""
    if not isinstance(value, dict):
        return None
    sizes = {kind: integer(round(size), 0, 2**62) for kind in KINDS if (size := number(value.get(kind))) is not None}
    return {kind: size for kind, size in sizes.items() if size is not None}


def _axes(value: Any) -> dict[str, dict[str, float]]:
    """Return traffic by axis; entries that cannot be read are left out."""
    traffic: dict[str, dict[str, float]] = {}
    for name, counts in list(value.items())[:MAX_AXES] if isinstance(value, dict) else ():
        if not isinstance(counts, dict) or not _AXIS.fullmatch(name):
            continue
        valid = {key: checked for key in TRAFFIC if (checked := between(counts.get(key), 0, 1e18)) is not None}
        if len(valid) == len(TRAFFIC):
            traffic[name] = valid
    return traffic


def _action(row: Any) -> Action | None:
    """Return an action of a pipeline from its row: kind, stage, micro-batch, begin and end (s); None if invalid."""
    if not isinstance(row, list) or len(row) != 5 or row[0] not in ("F", "B", "I", "W"):
        return None
    stage, microbatch = integer(row[1], 0, MAX_RANKS), integer(row[2], 0, MAX_STEPS)
    begin, end = number(row[3]), number(row[4])
    if stage is None or microbatch is None or begin is None or end is None or not 0 <= begin <= end < 1e12:
        return None
    return Action(row[0], stage, microbatch, begin, end)


def _figures(value: Any, read: Callable[[Any], float | None] = number) -> dict[str, float]:
    """Return the numbers of a dict by name, {} for anything else; with `read=figure`, NaN for those not finite."""
    return figures(value, MAX_EFFECTIVE, read) or {}


def _pair(value: Any) -> dict[str, float]:
    """Return a positive number of the original and of the quantized network; {} if one is missing."""
    pair = _figures({name: value.get(name) for name in COMPARED} if isinstance(value, dict) else None)
    return pair if len(pair) == len(COMPARED) and all(0 < each < 1e18 for each in pair.values()) else {}


def _by_form(value: Any) -> dict[str, float]:
    """Return a number, 0 or more, for each form of an exported network that has one."""
    figures = _figures({form: value.get(form) for form in FORMS} if isinstance(value, dict) else None)
    return {form: each for form, each in figures.items() if 0 <= each < 1e18}


def _size(text: str) -> int | None:
    """Return a batch size from text (JSON's keys are texts); None if it is not one."""
    return int(text) if re.fullmatch(r"[1-9][0-9]{0,6}", text) else None


Handler = Callable[["RunData", int, dict[str, Any]], bool]
HANDLERS: dict[str, Handler] = {
    function.__name__: function
    for function in (
        *(
            rehearsal,
            start,
            first_step,
            steps,
            evaluation,
            checkpoint,
            trace,
            profile,
            communication,
            sparsity,
            link,
            effective,
        ),
        *(quantized, numbers, kernels, exported, memory, error, end),
    )
}
"""Handler of each kind of event; it returns False if the event cannot be read."""
