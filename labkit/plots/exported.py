"""What a sparse network gains in another form once it is trained: speed by batch size, bytes, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from labkit.experiment.after_training import FORMS
from labkit.plots import theme, traced, wording
from labkit.plots.picture import Picture, Row
from labkit.plots.shown import LabeledRun, shown
from labkit.runs.checked import NOT_FINITE

DENSE = next(iter(FORMS))
ALIKE = 1.05
"""A form is called faster from so many times the speed of the dense one on."""
MOST = 12
"""Forms of all runs together that are drawn; the table has all."""
WRITTEN = 4
"""With more of them numbers would lie on each other."""


def exported(runs: Iterable[Any] | Any) -> Picture:
    """Speed of each form over that of the dense network, by batch size (left), and bytes (right)."""
    many = [one for one in shown(runs) if one.data.exported.get("latency_seconds")]
    if not many:
        return traced.nothing("No exported network to show: 0 runs asked for one (sparsity.export does)")
    names = traced.names(many)
    sizes = sorted({size for one in many for size in one.data.exported["latency_seconds"]})
    sentence = wording.opening(_finding(names, many))
    rows = [_row(name, one, form, sizes) for name, one in zip(names, many, strict=True) for form in _forms(one)]
    every = [(name, one, form) for name, one in zip(names, many, strict=True) for form in _forms(one)[1:]][:MOST]
    if not every:
        return Picture([], traced.nothing(sentence).layout, summary=f"{sentence}.", rows=rows)
    traces: list[dict[str, Any]] = []
    for index, (name, one, form) in enumerate(every):
        label = FORMS[form] if len(many) == 1 else f"{name}: {FORMS[form]}"
        speeds, at = _speeds(one, form, sizes), [f"{size:,}" for size in sizes]
        traces += _bars(index, label, speeds, at, _bytes(one, form), written=len(every) <= WRITTEN)
    highest, longest = (
        max((value for trace in traces[at::2] for value in trace["y"] if value), default=0.0) for at in (0, 1)
    )
    whole = f"dense: {traced.size(many[0].data.exported['bytes'].get(DENSE, 0.0))}" if len(many) == 1 else ""
    layout = traced.layout(
        sentence,
        barmode="group",
        bargap=0.28,
        bargroupgap=0.06,
        xaxis=theme.axis("Samples in a batch", type="category", domain=[0, 0.66], showgrid=False),
        yaxis=theme.axis("Speed (dense = 1)", range=[0, 1.15 * max(1.0, highest)]),
        xaxis2=theme.axis(whole, type="category", domain=[0.76, 1], anchor="y2", showgrid=False, ticks=""),
        yaxis2=theme.axis("Bytes (% of dense)", anchor="x2", range=[0, 1.15 * max(100.0, longest)]),
        shapes=[_line()],
        height=370 + 20 * len(every),
        legend={"yref": "container", "y": 0, "yanchor": "bottom", "orientation": "v"},
    )
    layout["margin"] |= {"t": 76, "b": 80 + 20 * len(every)}
    return Picture(traces, layout, summary=f"{sentence}.", rows=rows)


def _forms(one: LabeledRun) -> list[str]:
    """Those of a run that were looked at, the dense one first."""
    found = one.data.exported
    measured = {form for seconds in found["latency_seconds"].values() for form in seconds}
    return [form for form in FORMS if form in measured]


def _speeds(one: LabeledRun, form: str, sizes: list[int]) -> list[float | None]:
    """Of a form over the dense one, by batch size; None where it was not measured."""
    latency = one.data.exported["latency_seconds"]
    every = [(latency.get(size, {}).get(form), latency.get(size, {}).get(DENSE)) for size in sizes]
    return [dense / seconds if seconds and dense else None for seconds, dense in every]


def _bytes(one: LabeledRun, form: str) -> tuple[float, str] | None:
    """Those of a form in percent of the dense network, and in words."""
    sizes = one.data.exported["bytes"]
    return (100 * sizes[form] / sizes[DENSE], traced.size(sizes[form])) if form in sizes and sizes.get(DENSE) else None


def _bars(
    index: int, label: str, speeds: list[float | None], sizes: list[str], held: tuple[float, str] | None, written: bool
) -> list[dict[str, Any]]:
    """A form in both panels; its numbers are `written` above its bars."""
    percent, said = held or (None, "")
    base = traced.bars(index, label, [], orientation="v", legendgroup=str(index), constraintext="none")
    left = {"x": sizes, "y": speeds, "hovertemplate": "batches of %{x}: %{y:.2f} times as fast as dense"}
    right = {"x": [""], "y": [percent], "xaxis": "x2", "yaxis": "y2", "showlegend": False}
    right |= {"hovertemplate": f"{said}: %{{y:.1f}} % of dense"}
    if written:
        left |= traced.outside(["" if value is None else f"{value:.2f}" for value in speeds])
        right |= traced.outside(["" if percent is None else f"{percent:.0f} %"])
    return [base | left, base | right]


def _line() -> dict[str, Any]:
    """As fast as the dense network."""
    line = {"color": theme.INK, "width": 1, "dash": "dot"}
    return {"type": "line", "xref": "x domain", "x0": 0, "x1": 1, "y0": 1, "y1": 1, "line": line}


def _finding(names: list[str], many: list[LabeledRun]) -> str:
    """The best at the largest batch of all runs; what it saves and what it costs."""
    size = max(size for one in many for size in one.data.exported["latency_seconds"])
    every = [
        (speed, form, name, one)
        for name, one in zip(names, many, strict=True)
        for form in _forms(one)[1:]
        for speed in _speeds(one, form, [size])
        if speed
    ]
    speed, form, name, one = max(every, key=lambda found: found[0], default=(0.0, DENSE, "", many[0]))
    if speed < ALIKE:
        return f"No form is faster than the dense network for batches of {size:,}"
    who = f"{name}, {FORMS[form]}" if len(many) > 1 else FORMS[form]
    said = f"{who}: {speed:.1f} times as fast as dense for batches of {size:,}"
    sizes = one.data.exported["bytes"]
    if form in sizes and sizes.get(DENSE):
        said += f", {traced.percent(sizes[form] / sizes[DENSE])} of the bytes"
    gap = _gap(one, form)
    return said if gap is None else f"{said}, the {gap[0]} {gap[1]}"


def _gap(one: LabeledRun, form: str) -> tuple[str, str] | None:
    """The metric by which people judge the workload, and how it differs from that of the dense network."""
    metrics = one.data.exported["metrics"]
    key = one.data.metric.get("key")
    key = key if key in metrics.get(form, {}) else "loss"
    ours, theirs = metrics.get(form, {}).get(key), metrics.get(DENSE, {}).get(key)
    if ours is None or theirs is None:
        return None
    change = ours - theirs
    word = theme.plain(str(key).replace("_", " "), 40)
    if not math.isfinite(change):
        return word, NOT_FINITE
    return (word, "the same") if abs(change) < 1e-4 else (word, f"{change:+.4f}")


def _row(name: str, one: LabeledRun, form: str, sizes: list[int]) -> Row:
    found = one.data.exported
    latency, speeds = found["latency_seconds"], _speeds(one, form, sizes)
    row: Row = {"Run": name, "Form": FORMS[form], "Layers changed": int(found["layers"].get(form, 0))}
    for size, speed in zip(sizes, speeds, strict=True):
        seconds = latency.get(size, {}).get(form)
        times = "" if seconds is None or form == DENSE or speed is None else f" ({speed:.2f}×)"
        row[f"Batch {size:,} (ms)"] = theme.number(None if seconds is None else 1000 * seconds) + times
    row["Bytes"] = traced.size(found["bytes"][form]) if form in found["bytes"] else "–"
    metrics = found["metrics"].get(form, {})
    for key in dict.fromkeys(["loss", one.data.metric.get("key")]):
        if key in metrics:
            row[f"Held-out {theme.plain(key, 40)}"] = theme.figure(metrics[key], 5)
    row["In the file"] = "yes" if form == found["saved"] else ""
    return row
