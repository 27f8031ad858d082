"""The trained network compared with its quantized copy: speed by batch size, and sensitivity of the layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from labkit.plots import theme, traced, wording
from labkit.plots.picture import Picture, Row
from labkit.plots.shown import LabeledRun, labeled_runs
from labkit.runs.checked import formatted

MAX_RUNS = 4
"""Maximum number of runs that are drawn; the table has all."""
METHOD_TITLES = {
    "int8_dynamic": "int8 dynamic",
    "int8_static": "int8 static",
    "int8_weight_only": "int8 weights",
    "int4_weight_only": "int4 weights",
}


def quantized(runs: Iterable[Any] | Any) -> Picture:
    """Plot the speed relative to the trained network by batch size, and the sensitivity of each layer.

    The sensitivity is the change of the loss when this layer alone is converted.
    """
    labeled = [run for run in labeled_runs(runs) if run.data.quantized.get("latency_seconds")]
    if not labeled:
        return traced.empty_picture(
            "No quantized network to show: 0 runs quantized one (set quantization.after_training)"
        )
    names = _names(labeled)
    sizes = sorted({size for run in labeled for size in run.data.quantized["latency_seconds"]})
    sentence = wording.opening(
        _finding(names[0], labeled[0], sizes) if len(labeled) == 1 else _findings(names, labeled, sizes)
    )
    drawn = list(zip(names, labeled, strict=True))[:MAX_RUNS]
    layers = list(dict.fromkeys(layer for _, run in drawn for layer, _ in run.data.quantized["sensitivity"]))
    traces: list[dict[str, Any]] = []
    for index, (name, run) in enumerate(drawn):
        speeds = [_speed(run, size) for size in sizes]
        changes = dict(run.data.quantized["sensitivity"])
        bar = traced.bar_trace(index, name, [], legendgroup=str(index), constraintext="none")
        left = {"orientation": "v", "x": [f"{size:,}" for size in sizes], "y": speeds}
        left |= {"hovertemplate": "batches of %{x}: %{y:.2f} times as fast as trained"}
        right = {"x": [changes.get(layer) for layer in layers], "y": [_short(layer) for layer in layers]}
        right |= {"xaxis": "x2", "yaxis": "y2", "showlegend": False, "hovertemplate": "%{y} alone: %{x:+.2~e}"}
        if len(drawn) == 1:
            left |= traced.outside_text(["" if speed is None else f"{speed:.2f}" for speed in speeds])
        traces += [bar | left, bar | right]
    fastest = max((speed for trace in traces[::2] for speed in trace["y"] if speed), default=1.0)
    layout = traced.layout(
        sentence,
        barmode="group",
        bargap=0.25,
        xaxis=theme.axis("Samples in a batch", type="category", domain=[0, 0.4], showgrid=False),
        yaxis=theme.axis("Speed (as trained = 1)", range=[0, 1.15 * max(1.0, fastest)]),
        xaxis2=theme.axis("Change of the loss when this layer alone is converted", domain=[0.62, 1], anchor="y2"),
        yaxis2=theme.axis("", anchor="x2", autorange="reversed", type="category", showgrid=False, automargin=True),
        shapes=[_trained_line()],
        height=max(400, 190 + 22 * len(layers) * max(1, len(drawn) // 2)),
    )
    rows = [_row(name, run, sizes) for name, run in zip(names, labeled, strict=True)]
    return Picture(traces, layout, summary=f"{sentence}.", rows=rows)


def _names(labeled: list[LabeledRun]) -> list[str]:
    """Return the conversion of each run, or if those are not distinct, the names of the runs with it."""
    methods = [METHOD_TITLES.get(str(run.data.quantized.get("method")), "quantized") for run in labeled]
    if len(set(methods)) == len(labeled):
        return methods
    return [f"{name}, {method}" for name, method in zip(traced.run_names(labeled), methods, strict=True)]


def _speed(run: LabeledRun, size: int) -> float | None:
    seconds = run.data.quantized["latency_seconds"].get(size, {})
    return seconds["float"] / seconds["quantized"] if len(seconds) == 2 and seconds["quantized"] else None


def _bytes_ratio(run: LabeledRun) -> float | None:
    """Return how many times fewer bytes the converted layers take; None if unknown."""
    layer_bytes = run.data.quantized.get("layer_bytes") or {}
    return (
        layer_bytes["float"] / layer_bytes["quantized"] if len(layer_bytes) == 2 and layer_bytes["quantized"] else None
    )


def _gap(run: LabeledRun) -> tuple[str, float] | None:
    """Return the name of the workload's main metric (or the loss) and its change; None if it was not measured."""
    metrics = run.data.quantized["metrics"]
    before, after = (metrics.get(kind, {}) for kind in ("float", "quantized"))
    for key in (str(run.data.metric.get("key")), "loss"):
        if before.get(key) is not None and after.get(key) is not None:
            return theme.plain(key.replace("_", " "), 40), after[key] - before[key]
    return None


def _most_sensitive(run: LabeledRun) -> tuple[str, float] | None:
    """Return the layer whose conversion alone raises the loss most, and the change; None if it was not measured."""
    measured = [(layer, change) for layer, change in run.data.quantized["sensitivity"] if change is not None]
    return max(measured, key=lambda pair: pair[1], default=None)


def _finding(name: str, run: LabeledRun, sizes: list[int]) -> str:
    parts = []
    speed, smaller, gap, worst = _speed(run, sizes[-1]), _bytes_ratio(run), _gap(run), _most_sensitive(run)
    if speed is not None:
        parts.append(f"{speed:.1f} times the speed for batches of {sizes[-1]:,}")
    if smaller is not None:
        parts.append(f"{smaller:.1f} times fewer bytes")
    if gap is not None:
        parts.append(f"{gap[0]} {formatted(gap[1], '+.2g')}")
    sentence = f"{name}: {', '.join(parts)}"
    return (
        f"{sentence}; {_short(worst[0])} is the most sensitive layer"
        if worst is not None and worst[1] > 0
        else sentence
    )


def _findings(names: list[str], labeled: list[LabeledRun], sizes: list[int]) -> str:
    speeds = [(speed, name) for name, run in zip(names, labeled, strict=True) if (speed := _speed(run, sizes[-1]))]
    if not speeds:
        return f"{len(labeled)} conversions compared"
    speed, name = max(speeds)
    return f"{name} is the fastest of {len(labeled)}: {speed:.1f} times for batches of {sizes[-1]:,}"


def _short(layer: str) -> str:
    return theme.plain(layer.removeprefix("blocks."), 60)


def _trained_line() -> dict[str, Any]:
    """Return the line that marks the speed of the trained network."""
    line = {"color": theme.INK, "width": 1, "dash": "dot"}
    return {"type": "line", "xref": "x domain", "x0": 0, "x1": 1, "y0": 1, "y1": 1, "line": line}


def _row(name: str, run: LabeledRun, sizes: list[int]) -> Row:
    row: Row = {"Run": name, "Layers": run.data.quantized.get("layers") or 0}
    for size in sizes:
        speed = _speed(run, size)
        row[f"Speed, batch {size:,}"] = "–" if speed is None else f"{speed:.2f} ×"
    smaller, gap, worst = _bytes_ratio(run), _gap(run), _most_sensitive(run)
    row["Bytes of its layers"] = "–" if smaller is None else f"{smaller:.1f} × fewer"
    row["Change"] = "–" if gap is None else f"{gap[0]} {formatted(gap[1], '+.4f')}"
    row["Most sensitive layer"] = "–" if worst is None else f"{_short(worst[0])} ({worst[1]:+.2g})"
    return row
