"""Exported sparse networks: speed by batch size, bytes, and change of the metric for each form."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from labkit.experiment.after_training import FORMS
from labkit.plots import theme, traced, wording
from labkit.plots.picture import Picture, Row
from labkit.plots.shown import LabeledRun, labeled_runs
from labkit.runs.checked import NOT_FINITE

DENSE = next(iter(FORMS))
MIN_SPEEDUP = 1.05
"""Minimum speed-up over the dense network from which a form is called faster."""
MAX_FORMS = 12
"""Maximum number of forms, over all runs, that are drawn; the table has all."""
MAX_FORMS_WITH_TEXT = 4
"""With more forms than this, numbers above the bars would overlap."""


def exported(runs: Iterable[Any] | Any) -> Picture:
    """Plot the speed of each form relative to the dense network by batch size (left) and its bytes (right)."""
    labeled = [run for run in labeled_runs(runs) if run.data.exported.get("latency_seconds")]
    if not labeled:
        return traced.empty_picture("No exported network to show: 0 runs exported one (set sparsity.export)")
    names = traced.run_names(labeled)
    sizes = sorted({size for run in labeled for size in run.data.exported["latency_seconds"]})
    sentence = wording.opening(_finding(names, labeled))
    rows = [_row(name, run, form, sizes) for name, run in zip(names, labeled, strict=True) for form in _forms(run)]
    drawn = [(name, run, form) for name, run in zip(names, labeled, strict=True) for form in _forms(run)[1:]][
        :MAX_FORMS
    ]
    if not drawn:
        return Picture([], traced.empty_picture(sentence).layout, summary=f"{sentence}.", rows=rows)
    traces: list[dict[str, Any]] = []
    for index, (name, run, form) in enumerate(drawn):
        label = FORMS[form] if len(labeled) == 1 else f"{name}: {FORMS[form]}"
        speeds, labels = _speeds(run, form, sizes), [f"{size:,}" for size in sizes]
        traces += _bars(index, label, speeds, labels, _bytes(run, form), written=len(drawn) <= MAX_FORMS_WITH_TEXT)
    max_speed, max_percent = (
        max((value for trace in traces[panel::2] for value in trace["y"] if value), default=0.0) for panel in (0, 1)
    )
    dense_bytes = labeled[0].data.exported["bytes"].get(DENSE, 0.0)
    dense_size = f"dense: {traced.format_bytes(dense_bytes)}" if len(labeled) == 1 else ""
    layout = traced.layout(
        sentence,
        barmode="group",
        bargap=0.28,
        bargroupgap=0.06,
        xaxis=theme.axis("Samples in a batch", type="category", domain=[0, 0.66], showgrid=False),
        yaxis=theme.axis("Speed (dense = 1)", range=[0, 1.15 * max(1.0, max_speed)]),
        xaxis2=theme.axis(dense_size, type="category", domain=[0.76, 1], anchor="y2", showgrid=False, ticks=""),
        yaxis2=theme.axis("Bytes (% of dense)", anchor="x2", range=[0, 1.15 * max(100.0, max_percent)]),
        shapes=[_dense_line()],
        height=370 + 20 * len(drawn),
        legend={"yref": "container", "y": 0, "yanchor": "bottom", "orientation": "v"},
    )
    layout["margin"] |= {"t": 76, "b": 80 + 20 * len(drawn)}
    return Picture(traces, layout, summary=f"{sentence}.", rows=rows)


def _forms(run: LabeledRun) -> list[str]:
    """Return the forms of a run that were measured, the dense one first."""
    results = run.data.exported
    measured = {form for seconds in results["latency_seconds"].values() for form in seconds}
    return [form for form in FORMS if form in measured]


def _speeds(run: LabeledRun, form: str, sizes: list[int]) -> list[float | None]:
    """Return the speed-up of a form over the dense one by batch size; None where it was not measured."""
    latency = run.data.exported["latency_seconds"]
    pairs = [(latency.get(size, {}).get(form), latency.get(size, {}).get(DENSE)) for size in sizes]
    return [dense / seconds if seconds and dense else None for seconds, dense in pairs]


def _bytes(run: LabeledRun, form: str) -> tuple[float, str] | None:
    """Return the bytes of a form in percent of the dense network, and as text."""
    sizes = run.data.exported["bytes"]
    return (
        (100 * sizes[form] / sizes[DENSE], traced.format_bytes(sizes[form]))
        if form in sizes and sizes.get(DENSE)
        else None
    )


def _bars(
    index: int, label: str, speeds: list[float | None], sizes: list[str], size: tuple[float, str] | None, written: bool
) -> list[dict[str, Any]]:
    """Return the bars of a form in both panels; with `written`, numbers are put above them."""
    percent, size_text = size or (None, "")
    bar = traced.bar_trace(index, label, [], orientation="v", legendgroup=str(index), constraintext="none")
    left = {"x": sizes, "y": speeds, "hovertemplate": "batches of %{x}: %{y:.2f} times as fast as dense"}
    right = {"x": [""], "y": [percent], "xaxis": "x2", "yaxis": "y2", "showlegend": False}
    right |= {"hovertemplate": f"{size_text}: %{{y:.1f}} % of dense"}
    if written:
        left |= traced.outside_text(["" if value is None else f"{value:.2f}" for value in speeds])
        right |= traced.outside_text(["" if percent is None else f"{percent:.0f} %"])
    return [bar | left, bar | right]


def _dense_line() -> dict[str, Any]:
    """Return the line that marks the speed of the dense network."""
    line = {"color": theme.INK, "width": 1, "dash": "dot"}
    return {"type": "line", "xref": "x domain", "x0": 0, "x1": 1, "y0": 1, "y1": 1, "line": line}


def _finding(names: list[str], labeled: list[LabeledRun]) -> str:
    """Return the headline: the fastest form at the largest batch size, its bytes and its change of the metric."""
    size = max(size for run in labeled for size in run.data.exported["latency_seconds"])
    measured = [
        (speed, form, name, run)
        for name, run in zip(names, labeled, strict=True)
        for form in _forms(run)[1:]
        for speed in _speeds(run, form, [size])
        if speed
    ]
    speed, form, name, run = max(measured, key=lambda entry: entry[0], default=(0.0, DENSE, "", labeled[0]))
    if speed < MIN_SPEEDUP:
        return f"No form is faster than the dense network for batches of {size:,}"
    subject = f"{name}, {FORMS[form]}" if len(labeled) > 1 else FORMS[form]
    sentence = f"{subject}: {speed:.1f} times as fast as dense for batches of {size:,}"
    sizes = run.data.exported["bytes"]
    if form in sizes and sizes.get(DENSE):
        sentence += f", {traced.percent(sizes[form] / sizes[DENSE])} of the bytes"
    gap = _gap(run, form)
    return sentence if gap is None else f"{sentence}, the {gap[0]} {gap[1]}"


def _gap(run: LabeledRun, form: str) -> tuple[str, str] | None:
    """Return the name of the workload's main metric (or loss) and its difference from the dense network, as text."""
    metrics = run.data.exported["metrics"]
    key = run.data.metric.get("key")
    key = key if key in metrics.get(form, {}) else "loss"
    metric, dense_metric = metrics.get(form, {}).get(key), metrics.get(DENSE, {}).get(key)
    if metric is None or dense_metric is None:
        return None
    change = metric - dense_metric
    metric_name = theme.plain(str(key).replace("_", " "), 40)
    if not math.isfinite(change):
        return metric_name, NOT_FINITE
    return (metric_name, "the same") if abs(change) < 1e-4 else (metric_name, f"{change:+.4f}")


def _row(name: str, run: LabeledRun, form: str, sizes: list[int]) -> Row:
    results = run.data.exported
    latency, speeds = results["latency_seconds"], _speeds(run, form, sizes)
    row: Row = {"Run": name, "Form": FORMS[form], "Layers changed": int(results["layers"].get(form, 0))}
    for size, speed in zip(sizes, speeds, strict=True):
        seconds = latency.get(size, {}).get(form)
        factor = "" if seconds is None or form == DENSE or speed is None else f" ({speed:.2f}×)"
        row[f"Batch {size:,} (ms)"] = theme.number(None if seconds is None else 1000 * seconds) + factor
    row["Bytes"] = traced.format_bytes(results["bytes"][form]) if form in results["bytes"] else "–"
    metrics = results["metrics"].get(form, {})
    for key in dict.fromkeys(["loss", run.data.metric.get("key")]):
        if key in metrics:
            row[f"Held-out {theme.plain(key, 40)}"] = theme.figure(metrics[key], 5)
    row["In the file"] = "yes" if form == results["saved"] else ""
    return row
