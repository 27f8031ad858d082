"""The network after training beside its quantized copy: speed by batch size, and which layers suffer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from labkit.plots import theme, traced, wording
from labkit.plots.picture import Picture, Row
from labkit.plots.shown import LabeledRun, shown
from labkit.runs.checked import formatted

MOST_RUNS = 4
"""So many runs are drawn; the table has all."""
WORDS = {
    "int8_dynamic": "int8 dynamic",
    "int8_static": "int8 static",
    "int8_weight_only": "int8 weights",
    "int4_weight_only": "int4 weights",
}


def quantized(runs: Iterable[Any] | Any) -> Picture:
    """Speed over the network as it was trained, by batch size (left); change of the loss when a layer alone is
    converted (right).
    """
    many = [one for one in shown(runs) if one.data.quantized.get("latency_seconds")]
    if not many:
        return traced.nothing("No quantized network to show: 0 runs asked for one (quantization.after_training does)")
    names = _names(many)
    sizes = sorted({size for one in many for size in one.data.quantized["latency_seconds"]})
    sentence = wording.opening(_finding(names[0], many[0], sizes) if len(many) == 1 else _findings(names, many, sizes))
    drawn = list(zip(names, many, strict=True))[:MOST_RUNS]
    layers = list(dict.fromkeys(layer for _, one in drawn for layer, _ in one.data.quantized["sensitivity"]))
    traces: list[dict[str, Any]] = []
    for index, (name, one) in enumerate(drawn):
        speeds = [_speed(one, size) for size in sizes]
        changes = dict(one.data.quantized["sensitivity"])
        base = traced.bars(index, name, [], legendgroup=str(index), constraintext="none")
        up = {"orientation": "v", "x": [f"{size:,}" for size in sizes], "y": speeds}
        up |= {"hovertemplate": "batches of %{x}: %{y:.2f} times as fast as trained"}
        across = {"x": [changes.get(layer) for layer in layers], "y": [_short(layer) for layer in layers]}
        across |= {"xaxis": "x2", "yaxis": "y2", "showlegend": False, "hovertemplate": "%{y} alone: %{x:+.2~e}"}
        if len(drawn) == 1:
            up |= traced.outside(["" if speed is None else f"{speed:.2f}" for speed in speeds])
        traces += [base | up, base | across]
    fastest = max((speed for trace in traces[::2] for speed in trace["y"] if speed), default=1.0)
    layout = traced.layout(
        sentence,
        barmode="group",
        bargap=0.25,
        xaxis=theme.axis("Samples in a batch", type="category", domain=[0, 0.4], showgrid=False),
        yaxis=theme.axis("Speed (as trained = 1)", range=[0, 1.15 * max(1.0, fastest)]),
        xaxis2=theme.axis("Change of the loss when this layer alone is converted", domain=[0.62, 1], anchor="y2"),
        yaxis2=theme.axis("", anchor="x2", autorange="reversed", type="category", showgrid=False, automargin=True),
        shapes=[_line()],
        height=max(400, 190 + 22 * len(layers) * max(1, len(drawn) // 2)),
    )
    rows = [_row(name, one, sizes) for name, one in zip(names, many, strict=True)]
    return Picture(traces, layout, summary=f"{sentence}.", rows=rows)


def _names(many: list[LabeledRun]) -> list[str]:
    """The conversion, and where that is the same for all, what else tells the runs apart."""
    methods = [WORDS.get(str(one.data.quantized.get("method")), "quantized") for one in many]
    if len(set(methods)) == len(many):
        return methods
    return [f"{name}, {method}" for name, method in zip(traced.names(many), methods, strict=True)]


def _speed(one: LabeledRun, size: int) -> float | None:
    seconds = one.data.quantized["latency_seconds"].get(size, {})
    return seconds["float"] / seconds["quantized"] if len(seconds) == 2 and seconds["quantized"] else None


def _smaller(one: LabeledRun) -> float | None:
    """How many times fewer bytes the converted layers take."""
    held = one.data.quantized.get("layer_bytes") or {}
    return held["float"] / held["quantized"] if len(held) == 2 and held["quantized"] else None


def _gap(one: LabeledRun) -> tuple[str, float] | None:
    """The metric by which people judge the workload (the loss where there is none), and its change."""
    metrics = one.data.quantized["metrics"]
    before, after = (metrics.get(kind, {}) for kind in ("float", "quantized"))
    for key in (str(one.data.metric.get("key")), "loss"):
        if before.get(key) is not None and after.get(key) is not None:
            return theme.plain(key.replace("_", " "), 40), after[key] - before[key]
    return None


def _worst(one: LabeledRun) -> tuple[str, float] | None:
    """The layer that costs most when it alone is converted."""
    known = [(layer, change) for layer, change in one.data.quantized["sensitivity"] if change is not None]
    return max(known, key=lambda pair: pair[1], default=None)


def _finding(name: str, one: LabeledRun, sizes: list[int]) -> str:
    said = []
    speed, smaller, gap, worst = _speed(one, sizes[-1]), _smaller(one), _gap(one), _worst(one)
    if speed is not None:
        said.append(f"{speed:.1f} times the speed for batches of {sizes[-1]:,}")
    if smaller is not None:
        said.append(f"{smaller:.1f} times fewer bytes")
    if gap is not None:
        said.append(f"{gap[0]} {formatted(gap[1], '+.2g')}")
    sentence = f"{name}: {', '.join(said)}"
    return f"{sentence}; {_short(worst[0])} suffers most" if worst is not None and worst[1] > 0 else sentence


def _findings(names: list[str], many: list[LabeledRun], sizes: list[int]) -> str:
    speeds = [(speed, name) for name, one in zip(names, many, strict=True) if (speed := _speed(one, sizes[-1]))]
    if not speeds:
        return f"{len(many)} conversions side by side"
    speed, name = max(speeds)
    return f"{name} is the fastest of {len(many)}: {speed:.1f} times for batches of {sizes[-1]:,}"


def _short(layer: str) -> str:
    return theme.plain(layer.removeprefix("blocks."), 60)


def _line() -> dict[str, Any]:
    """As fast as the network was."""
    line = {"color": theme.INK, "width": 1, "dash": "dot"}
    return {"type": "line", "xref": "x domain", "x0": 0, "x1": 1, "y0": 1, "y1": 1, "line": line}


def _row(name: str, one: LabeledRun, sizes: list[int]) -> Row:
    row: Row = {"Run": name, "Layers": one.data.quantized.get("layers") or 0}
    for size in sizes:
        speed = _speed(one, size)
        row[f"Speed, batch {size:,}"] = "–" if speed is None else f"{speed:.2f} ×"
    smaller, gap, worst = _smaller(one), _gap(one), _worst(one)
    row["Bytes of its layers"] = "–" if smaller is None else f"{smaller:.1f} × fewer"
    row["Change"] = "–" if gap is None else f"{gap[0]} {formatted(gap[1], '+.4f')}"
    row["Suffers most"] = "–" if worst is None else f"{_short(worst[0])} ({worst[1]:+.2g})"
    return row
