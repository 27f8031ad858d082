"""Loss, held-out metric and throughput over the steps of one or several runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from labkit.plots import theme
from labkit.plots.against import HOVER, TITLES, x_at_steps, x_values
from labkit.plots.downsample import Floats, extremes, means
from labkit.plots.picture import Picture, Row
from labkit.plots.shown import LabeledRun, labeled_runs
from labkit.runs.data import RunData
from labkit.runs.methods import period
from labkit.runs.model_flops import model_flops_of
from labkit.runs.smooth import smooth
from labkit.runs.steady import rolling, steady_steps

SMOOTHED_FROM = 60
"""From this many steps on, the loss is drawn as a running mean over a faint line of the single steps."""
WIDTHS = (4, 2.5, 2)
"""Line widths by run: lines of equal runs coincide, so the first is the widest and stays visible below the others."""

Line = tuple[Floats, Floats]


# -- points ---------------------------------------------------------------------------------------------------------


def loss_lines(data: RunData, x_axis: str = "steps") -> tuple[Line, Line]:
    """Return the global loss of every step and its running mean (empty for a short run)."""
    x, loss = x_values(data, x_axis), data.loss
    raw = extremes(x, loss)
    if len(loss) < SMOOTHED_FROM:
        return raw, (np.zeros(0), np.zeros(0))
    bin_x, mean = means(x, loss)
    return raw, (bin_x, smooth(mean, max(5, len(mean) // 50)))


def metric_line(data: RunData, x_axis: str = "steps") -> Line:
    """Return the workload's metric on held-out data; in per cent if that is its unit."""
    key = data.metric.get("key", "")
    pairs = [(step, metrics[key]) for step, _, metrics in data.evaluations if key in metrics]
    if not pairs:
        return np.zeros(0), np.zeros(0)
    x, y = (np.array(column, dtype=np.float64) for column in zip(*pairs, strict=True))
    return extremes(x_at_steps(data, x, x_axis), y * (100 if data.metric.get("unit") == "%" else 1))


def throughput_line(data: RunData, x_axis: str = "steps") -> Line:
    """Return samples per second over all ranks; each step of a bin is weighted by its duration."""
    count = data.steps
    seconds = _step_seconds(data, count)
    with np.errstate(invalid="ignore", divide="ignore"):
        rate = data.samples / seconds
    x, y = means(x_values(data, x_axis), rate, weight=seconds, max_points=400)
    return (x, smooth(y, max(1, len(y) // 20))) if count >= SMOOTHED_FROM else (x, y)


def _step_seconds(data: RunData, count: int) -> Floats:
    """Return the duration of each step (s) on the first rank whose file has all steps; ranks wait for each other."""
    for seconds in data.seconds:
        if len(seconds) >= count:
            return seconds[:count].astype(np.float64)
    return np.full(count, np.nan)


def throughput(data: RunData, period_steps: int = 1) -> float | None:
    """Return samples per second at the median step time after the warm-up; None if there is no step after it.

    The median is taken over means of `period_steps` steps (labkit.runs.methods.period).
    """
    count = data.steps
    steady = steady_steps(count, data.disturbed_steps)
    if not steady.any():
        return None
    seconds, samples = _step_seconds(data, count)[steady], data.samples[:count][steady]
    finite = np.isfinite(seconds) & (samples > 0)
    if not finite.any():
        return None
    if not finite.all():
        seconds, samples = seconds[finite], samples[finite]
    median_seconds, batch = (
        float(np.median(rolling(seconds, period_steps))),
        samples[0] if samples.min() == samples.max() else np.median(samples),
    )
    return float(batch) / median_seconds if median_seconds > 0 else None


# -- findings -------------------------------------------------------------------------------------------------------


def loss_finding(runs: Sequence[LabeledRun]) -> str:
    """Return the headline of the latest run with steps: `Loss fell from 2.31 to 0.084 in 200 steps`."""
    for run in reversed(runs):
        loss = run.data.loss
        if not len(loss) or run.is_ceiling:
            continue
        not_finite = np.flatnonzero(~np.isfinite(loss))
        if len(not_finite):
            return f"The loss became NaN or infinite at step {run.data.first + int(not_finite[0]) + 1}"
        end = float(np.mean(loss[-max(1, min(20, len(loss) // 10)) :]))
        verb = "fell" if end < loss[0] else "rose"
        if len(loss) == 1:
            return f"Loss {theme.number(float(loss[0]))} at the first step"
        return f"Loss {verb} from {theme.number(float(loss[0]))} to {theme.number(end)} in {len(loss)} steps"
    return "Loss: no step yet"


def metric_finding(runs: Sequence[LabeledRun]) -> str:
    """Return the headline of the latest evaluated run: `Held-out accuracy 97.8 % after 200 steps`."""
    for run in reversed(runs):
        x, y = metric_line(run.data)
        if len(y) and not run.is_ceiling:
            unit = f" {theme.plain(run.data.metric['unit'])}" if run.data.metric.get("unit") else ""
            title = theme.plain(run.data.metric["title"])
            if not np.isfinite(y[-1]):
                return f"{title} is not finite after {int(x[-1])} steps"
            return f"{title} {theme.number(float(y[-1]))}{unit} after {int(x[-1])} steps"
    return "Held-out metric: no evaluation yet"


def throughput_finding(runs: Sequence[LabeledRun]) -> str:
    """Return the headline of the latest run with a throughput: `5,400 samples/s with 2 ranks (median)`."""
    latest_first = list(runs)[::-1]
    for run in sorted(latest_first, key=lambda run: run.is_ceiling):  # the ceiling only if there is no other run
        rate = throughput(run.data, period(run.experiment))
        if rate is not None:
            noun = "independent copies" if run.is_ceiling else "ranks"
            ranks = theme.ranks(run.world_size) if run.world_size == 1 else f"{run.world_size} {noun}"
            return f"{theme.number(rate)} samples/s{_utilisation(run, rate)} with {ranks} (median)"
    return "Throughput: no step after the warm-up yet"


def _utilisation(run: LabeledRun, samples_per_second: float) -> str:
    """Return the MFU of a run at its throughput in words; empty on CPUs and for cards with an unknown peak."""
    if run.experiment is None:
        return ""
    mfu = model_flops_of(run.data, run.experiment, samples_per_second).mfu
    return "" if mfu is None else f", {100 * mfu:.0f} % MFU,"


def metric_title(runs: Sequence[LabeledRun]) -> str:
    """Return the title of the metric's axis, with its unit."""
    for run in reversed(runs):
        if run.data.metric:
            unit = theme.plain(run.data.metric.get("unit", ""))
            return theme.plain(run.data.metric["title"]) + (f" ({unit})" if unit else "")
    return "Held-out metric"


# -- traces and figures -----------------------------------------------------------------------------------------------


def line(index: int, name: str, points: Line, unit: str, x_axis: str = "steps", **properties: Any) -> dict[str, Any]:
    """Return a line trace with the colour, dash and marker of the run at `index`."""
    colour, dash, marker = theme.style(index)
    has_markers = len(points[0]) <= 25
    return {
        "type": "scatter",
        "mode": "lines+markers" if has_markers else "lines",
        "name": theme.safe(name),
        "legendgroup": str(index),
        "showlegend": True,
        "x": points[0],
        "y": points[1],
        "line": {"color": colour, "dash": dash, "width": WIDTHS[min(index, len(WIDTHS) - 1)]},
        "marker": {"symbol": marker, "size": 7, "color": colour},
        "hovertemplate": f"{HOVER[x_axis]}: %{{y:.4~g}}{theme.safe(unit)}<extra>%{{fullData.name}}</extra>",
    } | properties


def faint(index: int, name: str, points: Line, **properties: Any) -> dict[str, Any]:
    """Return the faint line of the single steps behind a running mean."""
    return line(index, name, points, "", **properties) | {
        "mode": "lines",
        "line": {"color": theme.style(index)[0], "width": 1},
        "opacity": 0.3,
        "showlegend": False,
        "hoverinfo": "skip",
        "hovertemplate": None,
    }


def loss_traces(index: int, run: LabeledRun, x_axis: str = "steps", **properties: Any) -> list[dict[str, Any]]:
    """Return two traces, the single steps and the named line; always two, so that a live figure keeps its order."""
    raw, mean = loss_lines(run.data, x_axis)
    short = not len(mean[0])
    nothing = (np.zeros(0), np.zeros(0))
    return [
        faint(index, run.label, nothing if short else raw, **properties),
        line(index, run.label, raw if short else mean, "", x_axis, **properties),
    ]


def loss(runs: Iterable[Any] | Any) -> Picture:
    """Plot the global training loss per step, one line per run. `runs`: one or several Run, RunData, run id or path."""
    labeled = labeled_runs(runs)
    traces = [trace for index, run in enumerate(labeled) for trace in loss_traces(index, run)]
    rows = [_ends(run.label, loss_lines(run.data)[0], "Loss") for run in labeled]
    return _picture(traces, loss_finding(labeled), "Training loss", rows)


def metric(runs: Iterable[Any] | Any) -> Picture:
    """Plot the workload's metric on held-out data, one line per run."""
    labeled = labeled_runs(runs)
    traces = [line(index, run.label, metric_line(run.data), "") for index, run in enumerate(labeled)]
    rows = [_ends(run.label, metric_line(run.data), metric_title([run])) for run in labeled]
    return _picture(traces, metric_finding(labeled), metric_title(labeled), rows)


def throughputs(runs: Iterable[Any] | Any) -> Picture:
    """Plot samples per second over all ranks, one line per run. The title leaves out the warm-up steps."""
    labeled = labeled_runs(runs)
    traces = [line(index, run.label, throughput_line(run.data), " samples/s") for index, run in enumerate(labeled)]
    rows: list[Row] = [
        {
            "Run": run.label,
            "Ranks": run.world_size,
            "Steps": run.data.steps,
            "Samples/s": theme.number(throughput(run.data, period(run.experiment))),
        }
        for run in labeled
    ]
    return _picture(traces, throughput_finding(labeled), "Throughput (samples/s)", rows, rangemode="tozero")


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
    """Return the first, lowest, highest and last value of a line as a table row."""
    finite = points[1][np.isfinite(points[1])]
    return {
        "Run": label,
        "Points": len(points[1]),
        f"{title}, first": theme.number(float(finite[0]) if len(finite) else None),
        "lowest": theme.number(float(finite.min()) if len(finite) else None),
        "highest": theme.number(float(finite.max()) if len(finite) else None),
        "last": theme.figure(float(points[1][-1]) if len(points[1]) else None),
    }
