"""Loss, held-out metric and throughput over the steps of one or several runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from labkit.plots import theme
from labkit.plots.against import HOVER, TITLES, along, at_steps
from labkit.plots.downsample import Floats, extremes, means
from labkit.plots.picture import Picture, Row
from labkit.plots.shown import LabeledRun, shown
from labkit.runs.data import RunData
from labkit.runs.methods import period
from labkit.runs.smooth import smooth
from labkit.runs.steady import rolling, warmup

SMOOTHED_FROM = 60
"""From this many steps on, the loss is drawn as a running mean over a faint line of the single steps."""
WIDTHS = (4, 2.5, 2)
"""Equal runs lie on each other: the first one is the widest, so that it can be seen below the others."""

Line = tuple[Floats, Floats]


# -- points ---------------------------------------------------------------------------------------------------------


def loss_lines(data: RunData, against: str = "steps") -> tuple[Line, Line]:
    """The global loss of every step, and its running mean (empty for a short run)."""
    x, loss = along(data, against), data.loss
    raw = extremes(x, loss)
    if len(loss) < SMOOTHED_FROM:
        return raw, (np.zeros(0), np.zeros(0))
    at, mean = means(x, loss)
    return raw, (at, smooth(mean, max(5, len(mean) // 50)))


def metric_line(data: RunData, against: str = "steps") -> Line:
    """The metric of the workload on held-out data; a fraction in per cent where its unit says so."""
    key = data.metric.get("key", "")
    pairs = [(step, metrics[key]) for step, _, metrics in data.evaluations if key in metrics]
    if not pairs:
        return np.zeros(0), np.zeros(0)
    x, y = (np.array(column, dtype=np.float64) for column in zip(*pairs, strict=True))
    return extremes(at_steps(data, x, against), y * (100 if data.metric.get("unit") == "%" else 1))


def throughput_line(data: RunData, against: str = "steps") -> Line:
    """Samples per second while stepping (all ranks together); bins weigh every step by its duration."""
    count = data.steps
    seconds = _step_seconds(data, count)
    with np.errstate(invalid="ignore", divide="ignore"):
        rate = data.samples / seconds
    x, y = means(along(data, against), rate, weight=seconds, most=400)
    return (x, smooth(y, max(1, len(y) // 20))) if count >= SMOOTHED_FROM else (x, y)


def _step_seconds(data: RunData, count: int) -> Floats:
    """Duration of each step: rank 0's, or that of the first rank whose file is there. Ranks wait for each other."""
    for seconds in data.seconds:
        if len(seconds) >= count:
            return seconds[:count].astype(np.float64)
    return np.full(count, np.nan)


def throughput(data: RunData, every: int = 1) -> float | None:
    """Samples per second at the median step time after the warm-up; None before there is a step after it.

    `every`: over means of so many steps, where ranks meet once in so many only (labkit.runs.methods.period).
    """
    count = data.steps
    skipped = warmup(count)
    if count <= skipped:
        return None
    seconds = _step_seconds(data, count)[skipped:]
    samples = data.samples[skipped:count]
    known = np.isfinite(seconds) & (samples > 0)
    if not known.any():
        return None
    if not known.all():
        seconds, samples = seconds[known], samples[known]
    middle, batch = (
        float(np.median(rolling(seconds, every))),
        samples[0] if samples.min() == samples.max() else np.median(samples),
    )
    return float(batch) / middle if middle > 0 else None


# -- findings -------------------------------------------------------------------------------------------------------


def loss_finding(runs: Sequence[LabeledRun]) -> str:
    """`Loss fell from 2.31 to 0.084 in 200 steps`, of the latest run that has steps."""
    for one in reversed(runs):
        loss = one.data.loss
        if not len(loss) or one.is_ceiling:
            continue
        broken = np.flatnonzero(~np.isfinite(loss))
        if len(broken):
            return f"The loss is no finite number from step {one.data.first + int(broken[0]) + 1} on"
        end = float(np.mean(loss[-max(1, min(20, len(loss) // 10)) :]))
        verb = "fell" if end < loss[0] else "rose"
        if len(loss) == 1:
            return f"Loss {theme.number(float(loss[0]))} at the first step"
        return f"Loss {verb} from {theme.number(float(loss[0]))} to {theme.number(end)} in {len(loss)} steps"
    return "Loss: no step yet"


def metric_finding(runs: Sequence[LabeledRun]) -> str:
    """`Held-out accuracy 97.8 % after 200 steps`, of the latest run that has been evaluated."""
    for one in reversed(runs):
        x, y = metric_line(one.data)
        if len(y) and not one.is_ceiling:
            unit = f" {theme.plain(one.data.metric['unit'])}" if one.data.metric.get("unit") else ""
            title = theme.plain(one.data.metric["title"])
            if not np.isfinite(y[-1]):
                return f"{title} is not finite after {int(x[-1])} steps"
            return f"{title} {theme.number(float(y[-1]))}{unit} after {int(x[-1])} steps"
    return "Held-out metric: no evaluation yet"


def throughput_finding(runs: Sequence[LabeledRun]) -> str:
    """`5,400 samples/s with 2 ranks (median after 20 warm-up steps)`, of the latest run that has one."""
    latest_first = list(runs)[::-1]
    for one in sorted(latest_first, key=lambda one: one.is_ceiling):  # the ceiling speaks only when alone
        rate = throughput(one.data, period(one.experiment))
        if rate is not None:
            what = "independent copies" if one.is_ceiling else "ranks"
            many = theme.ranks(one.world_size) if one.world_size == 1 else f"{one.world_size} {what}"
            return f"{theme.number(rate)} samples/s with {many} (median)"
    return "Throughput: no step after the warm-up yet"


def metric_title(runs: Sequence[LabeledRun]) -> str:
    """Title of the metric's axis, with its unit."""
    for one in reversed(runs):
        if one.data.metric:
            unit = theme.plain(one.data.metric.get("unit", ""))
            return theme.plain(one.data.metric["title"]) + (f" ({unit})" if unit else "")
    return "Held-out metric"


# -- traces and figures -----------------------------------------------------------------------------------------------


def line(index: int, name: str, points: Line, unit: str, against: str = "steps", **more: Any) -> dict[str, Any]:
    """One line: colour, dash and marker of the run at `index`."""
    colour, dash, marker = theme.style(index)
    few = len(points[0]) <= 25
    return {
        "type": "scatter",
        "mode": "lines+markers" if few else "lines",
        "name": theme.safe(name),
        "legendgroup": str(index),
        "showlegend": True,
        "x": points[0],
        "y": points[1],
        "line": {"color": colour, "dash": dash, "width": WIDTHS[min(index, len(WIDTHS) - 1)]},
        "marker": {"symbol": marker, "size": 7, "color": colour},
        "hovertemplate": f"{HOVER[against]}: %{{y:.4~g}}{theme.safe(unit)}<extra>%{{fullData.name}}</extra>",
    } | more


def faint(index: int, name: str, points: Line, **more: Any) -> dict[str, Any]:
    """The single steps behind a running mean."""
    return line(index, name, points, "", **more) | {
        "mode": "lines",
        "line": {"color": theme.style(index)[0], "width": 1},
        "opacity": 0.3,
        "showlegend": False,
        "hoverinfo": "skip",
        "hovertemplate": None,
    }


def loss_traces(index: int, one: LabeledRun, against: str = "steps", **more: Any) -> list[dict[str, Any]]:
    """Always two traces, the single steps and what the legend names, so that a live figure keeps its places."""
    raw, mean = loss_lines(one.data, against)
    few = not len(mean[0])
    nothing = (np.zeros(0), np.zeros(0))
    return [
        faint(index, one.label, nothing if few else raw, **more),
        line(index, one.label, raw if few else mean, "", against, **more),
    ]


def loss(runs: Iterable[Any] | Any) -> Picture:
    """Global training loss per step; one line a run. `runs`: Run, RunData, run id or path, one or several."""
    many = shown(runs)
    traces = [trace for at, one in enumerate(many) for trace in loss_traces(at, one)]
    rows = [_ends(one.label, loss_lines(one.data)[0], "Loss") for one in many]
    return _picture(traces, loss_finding(many), "Training loss", rows)


def metric(runs: Iterable[Any] | Any) -> Picture:
    """The workload's own metric on held-out data; one line a run."""
    many = shown(runs)
    traces = [line(at, one.label, metric_line(one.data), "") for at, one in enumerate(many)]
    rows = [_ends(one.label, metric_line(one.data), metric_title([one])) for one in many]
    return _picture(traces, metric_finding(many), metric_title(many), rows)


def throughputs(runs: Iterable[Any] | Any) -> Picture:
    """Samples per second over all ranks; one line a run. The first steps are drawn but not counted in the title."""
    many = shown(runs)
    traces = [line(at, one.label, throughput_line(one.data), " samples/s") for at, one in enumerate(many)]
    rows: list[Row] = [
        {
            "Run": one.label,
            "Ranks": one.world_size,
            "Steps": one.data.steps,
            "Samples/s": theme.number(throughput(one.data, period(one.experiment))),
        }
        for one in many
    ]
    return _picture(traces, throughput_finding(many), "Throughput (samples/s)", rows, rangemode="tozero")


def _picture(traces: list[dict[str, Any]], finding: str, title: str, rows: list[Row], **axis: Any) -> Picture:
    layout = theme.layout(
        finding,
        xaxis=theme.axis(TITLES["steps"]),
        yaxis=theme.axis(theme.safe(title), **axis),
        legend=theme.LAYOUT["legend"] | {"y": -0.22, "yanchor": "top"},
        margin=theme.LAYOUT["margin"] | {"b": 84},
        showlegend=True,
    )
    return Picture(traces, layout, summary=f"{finding}.", rows=rows)


def _ends(label: str, points: Line, title: str) -> Row:
    """First, best and last value of a line."""
    y = points[1][np.isfinite(points[1])]
    return {
        "Run": label,
        "Points": len(points[1]),
        f"{title}, first": theme.number(float(y[0]) if len(y) else None),
        "lowest": theme.number(float(y.min()) if len(y) else None),
        "highest": theme.number(float(y.max()) if len(y) else None),
        "last": theme.figure(float(points[1][-1]) if len(points[1]) else None),
    }
