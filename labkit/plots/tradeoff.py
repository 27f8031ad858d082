"""The trade-off of gradient methods: loss against samples, time and bytes in one figure.

Loss against samples shows the effect of a method on learning; against time, its value on this machine; against bytes,
its value on a slow network.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from labkit.plots import curves, theme, traced, wording
from labkit.plots.against import HOVER, MB, TITLES, checked_x_axis, x_values
from labkit.plots.downsample import Floats, extremes
from labkit.plots.picture import Picture, Row
from labkit.plots.shown import LabeledRun, labeled_runs
from labkit.runs import target as targets
from labkit.runs.target import Reached

VIEWS = ("samples", "time", "bytes")
_BUTTONS = {"samples": "against samples", "time": "against time", "bytes": "against bytes"}
_PANELS = ([0.0, 0.46], [0.555, 1.0])
MAX_POINTS = 200
"""Maximum number of points of a line: each line is drawn three times, and an executed notebook stores all of them."""
MIN_LOG_FACTOR = 10
"""A loss that falls by more than this factor, or times that differ by more, get a logarithmic axis."""


@dataclass(frozen=True)
class _Line:
    """One run and what the figure shows of it."""

    name: str
    index: int
    """Index in the palette; -1 for the reference run, which is drawn in black."""
    run: LabeledRun
    loss: Floats
    """Running mean at each step."""
    final: float | None
    reached: Reached | None

    @property
    def plain(self) -> bool:
        """True for the reference run, with which the others are compared."""
        return self.index < 0


def tradeoff(runs: Iterable[Any] | Any, x_axis: str = "time", target: float | None = None) -> Picture:
    """Plot training loss and held-out metric of several runs, with a switch between samples, time and bytes.

    `x_axis` is shown first. `target` is the loss to reach; the default is 1.02 times the final loss of the first plain
    synchronous run (labkit.runs.target defines when it is reached). Runs without a step are left out.
    """
    checked_x_axis(x_axis, *VIEWS)
    labeled = [run for run in labeled_runs(runs) if run.data.steps and not run.is_ceiling]
    if not labeled:
        return traced.empty_picture("No trade-off to show: 0 runs have made a step")
    lines, target_loss, window = _lines(labeled, target)
    sentences = {view: _finding(lines, target_loss, view) for view in VIEWS}
    traces = [trace for view in VIEWS for trace in _traces(lines, target_loss, view, view == x_axis)]
    summary = f"{sentences[x_axis]}{_target_in_words(lines, target_loss, window, target is None)}."
    layout = _layout(lines, target_loss, window, sentences, x_axis)
    return Picture(traces, layout, summary=summary, rows=[_row(line, target_loss) for line in lines])


def _lines(labeled: Sequence[LabeledRun], requested: float | None) -> tuple[list[_Line], float | None, int]:
    """Return the runs, the target loss, and over how many steps losses are averaged."""
    index = targets.reference([(run.experiment, run.data) for run in labeled])
    reference = None if index is None else labeled[index]
    window = targets.window((reference or labeled[0]).data.steps)
    target_loss = (
        requested if requested is not None or reference is None else targets.default_target(reference.data, window)
    )
    palette_indices = iter(range(len(labeled)))
    lines = [
        _Line(
            name,
            -1 if run is reference else next(palette_indices),
            run,
            targets.running_loss(run.data, window),
            targets.final_loss(run.data, window),
            None if target_loss is None else targets.reached(run.data, target_loss, window),
        )
        for name, run in zip(traced.run_names(labeled), labeled, strict=True)
    ]
    return lines, target_loss, window


def _target_in_words(lines: Sequence[_Line], target_loss: float | None, window: int, default: bool) -> str:
    """Return the target loss in words."""
    if target_loss is None:
        return ""
    reference = next((line.name for line in lines if line.plain), "")
    remark = f", {targets.DEFAULT_MARGIN:g} times the final loss of {reference}" if default else ""
    return f"; target loss {theme.number(target_loss)}{remark} (mean of {window} steps)"


# -- findings -------------------------------------------------------------------------------------------------------


def _finding(lines: Sequence[_Line], target_loss: float | None, view: str) -> str:
    if view == "samples":
        return wording.opening(_gap(lines))
    return wording.opening(_race(lines, target_loss, view))


def _gap(lines: Sequence[_Line]) -> str:
    """Return the headline for samples: the differences of the losses after the fewest samples of any run."""
    fewest_samples = min(int(line.run.data.samples.sum()) for line in lines)
    losses = {line.name: _at_samples(line, fewest_samples) for line in lines}
    base = next((line.name for line in lines if line.plain), lines[0].name)
    finite = {name: loss for name, loss in losses.items() if np.isfinite(loss)}
    if base not in finite or len(finite) < 2:
        return f"{base}: loss {theme.number(losses[base])} after {fewest_samples:,} samples"
    gaps = {name: loss / finite[base] - 1 for name, loss in finite.items() if name != base}
    low, high = min(gaps, key=lambda name: gaps[name]), max(gaps, key=lambda name: gaps[name])
    after = f"after {fewest_samples:,} samples"
    if len(gaps) == 1:
        return f"{after} the loss of {low} is {_percent(gaps[low])} that of {base} ({theme.number(finite[base])})"
    return (
        f"{after} losses differ from {base}'s by {100 * gaps[low]:+.1f} % ({low}) to {100 * gaps[high]:+.1f} % ({high})"
    )


def _at_samples(line: _Line, samples: int) -> float:
    """Return the running mean of the loss at the step by which `samples` have been seen."""
    index = int(np.searchsorted(np.cumsum(line.run.data.samples), samples))
    return float(line.loss[min(index, len(line.loss) - 1)])


def _percent(gap: float) -> str:
    """Return a relative difference in words: `1.3 % above`."""
    if abs(gap) < 0.0005:
        return "equal to"
    return f"{theme.number(100 * abs(gap), 2)} % {'above' if gap > 0 else 'below'}"


def _race(lines: Sequence[_Line], target_loss: float | None, view: str) -> str:
    """Return the headline for time or bytes: the best run, and the cost of plain averaging or the second best."""
    if target_loss is None:
        return "0 of these runs are plain and synchronous: there is no loss to reach"
    loss = f"a loss of {theme.number(target_loss)}"
    costs = {line.name: cost for line in lines if (cost := _cost(line, view)) is not None}
    if not costs:
        is_measured = view != "bytes" or any(line.reached for line in lines)
        return (
            f"No run stays at or below {loss}"
            if is_measured or view == "time"
            else "No bytes were counted: 0 to compare"
        )
    best = min(costs, key=lambda name: costs[name])
    reference = next((line.name for line in lines if line.plain), None)
    sentence = f"{best} reaches {loss} {_cost_in_words(costs[best], view)}"
    if reference is not None and reference != best and reference in costs:
        return f"{sentence}, {reference} {_cost_in_words(costs[reference], view)}"
    others = {name: cost for name, cost in costs.items() if name != best}
    if others:
        second = min(others, key=lambda name: others[name])
        return f"{sentence}, {second} {_cost_in_words(costs[second], view)}"
    return sentence if len(lines) == 1 else f"{sentence}; no other run does"


def _cost(line: _Line, view: str) -> float | None:
    if line.reached is None:
        return None
    cost = {"samples": line.reached.samples, "time": line.reached.seconds, "bytes": line.reached.bytes}[view]
    return None if cost is None else float(cost)


def _cost_in_words(cost: float, view: str) -> str:
    return f"in {seconds(cost)}" if view == "time" else f"with {traced.format_bytes(cost)} sent"


def seconds(value: float) -> str:
    """Return a duration as text: `9.1 s`, `71 s`, `12 min`."""
    return f"{value / 60:.0f} min" if value >= 600 else f"{theme.number(value, 2)} s"


# -- the figure -------------------------------------------------------------------------------------------------------


def _traces(lines: Sequence[_Line], target_loss: float | None, view: str, visible: bool) -> list[dict[str, Any]]:
    """Return three traces per run: the loss, the point at which it reached the target, and the metric."""
    traces: list[dict[str, Any]] = []
    for index, line in enumerate(lines):
        data, style, reached_at = line.run.data, _line_style(line), _cost(line, view)
        star_x = [] if reached_at is None else [reached_at / MB if view == "bytes" else reached_at]
        shared: dict[str, Any] = {"visible": visible, "legendgroup": str(index)}
        loss = _downsampled(x_values(data, view), line.loss)
        held_out = _downsampled(*curves.metric_line(data, view))
        traces += [
            curves.line(index, line.name, loss, "", view, **shared) | style | {"mode": "lines"},
            curves.line(index, line.name, (np.array(star_x), np.full(len(star_x), target_loss)), "", view, **shared)
            | {
                "mode": "markers",
                "showlegend": False,
                "marker": style["marker"] | {"symbol": "star", "size": 15, "line": {"color": theme.PAPER, "width": 1}},
                "hovertemplate": f"target reached: {HOVER[view]}<extra>%{{fullData.name}}</extra>",
            },
            curves.line(index, line.name, held_out, "", view, **shared)
            | style
            | {"xaxis": "x2", "yaxis": "y2", "showlegend": False},
        ]
    return traces


def _line_style(line: _Line) -> dict[str, Any]:
    """Return the style of line and marker: black and thick for the reference run."""
    colour, dash, marker = (theme.INK, "solid", "circle") if line.plain else theme.style(line.index)
    return {
        "line": {"color": colour, "dash": dash, "width": 3.5 if line.plain else 2.2},
        "marker": {"symbol": marker, "size": 7, "color": colour},
    }


def _downsampled(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Return at most MAX_POINTS points as float32; points without a finite x are left out."""
    x_kept, y_kept = extremes(x, y, MAX_POINTS)
    finite = np.isfinite(x_kept)
    return x_kept[finite].astype(np.float32), y_kept[finite].astype(np.float32)


def _layout(
    lines: Sequence[_Line], target_loss: float | None, window: int, sentences: dict[str, str], x_axis: str
) -> dict[str, Any]:
    scales = {view: _x_scale(lines, view) for view in VIEWS}
    title = curves.metric_title([line.run for line in lines])
    figure_layout = traced.layout(
        sentences[x_axis],
        xaxis=theme.axis(TITLES[x_axis], domain=_PANELS[0], anchor="y", **scales[x_axis]),
        yaxis=theme.axis(f"Training loss (mean of {window} steps)", anchor="x", **_y_scale(lines)),
        xaxis2=theme.axis(TITLES[x_axis], domain=_PANELS[1], anchor="y2", matches="x", **scales[x_axis]),
        yaxis2=theme.axis(theme.safe(title), anchor="x2"),
        legend={"y": -0.2, "yanchor": "top"},
        height=500,
        updatemenus=[_switch(len(lines), sentences, scales, x_axis)],
    )
    if target_loss is not None:
        figure_layout["shapes"] = [
            {
                "type": "line",
                "xref": "x domain",
                "x0": 0,
                "x1": 1,
                "y0": target_loss,
                "y1": target_loss,
                "line": {"color": theme.INK, "width": 1.2, "dash": "dot"},
                "label": {
                    "text": f"target {theme.number(target_loss)}",
                    "textposition": "start",
                    "yanchor": "bottom",
                    "font": {"size": 12, "color": theme.INK},
                },
            }
        ]
    return figure_layout


def _y_scale(lines: Sequence[_Line]) -> dict[str, Any]:
    """Return the scale of the loss axis: logarithmic if the loss falls steeply, so that its end is visible."""
    finite = np.concatenate([line.loss[np.isfinite(line.loss)] for line in lines])
    if not len(finite) or finite.min() <= 0 or finite.max() / finite.min() < MIN_LOG_FACTOR:
        return {}
    return theme.decades(finite.min() / 1.15, finite.max() * 1.1)


def _x_scale(lines: Sequence[_Line], view: str) -> dict[str, Any]:
    """Return the scale of the x axis: logarithmic for bytes and for times that differ widely."""
    ends = [float(np.nanmax(values)) for line in lines if np.isfinite(values := x_values(line.run.data, view)).any()]
    ends = [end for end in ends if end > 0]
    if ends and (view == "bytes" or (view == "time" and max(ends) / min(ends) > MIN_LOG_FACTOR)):
        return theme.decades(min(ends) / 30, max(ends) * 1.15)
    return {"type": "linear", "autorange": True, "tickmode": "auto", "rangemode": "tozero"}


def _switch(runs: int, sentences: dict[str, str], scales: dict[str, dict[str, Any]], x_axis: str) -> dict[str, Any]:
    """Return three buttons above the panels: each shows its own lines, axes and headline."""
    buttons = []
    for view in VIEWS:
        changes: dict[str, Any] = {"title.text": theme.layout(sentences[view])["title"]["text"]}
        for name in ("xaxis", "xaxis2"):
            changes |= {f"{name}.{key}": value for key, value in scales[view].items()}
            changes[f"{name}.title.text"] = TITLES[view]
        visible = [view == trace_view for trace_view in VIEWS for _ in range(3 * runs)]
        buttons.append({"label": _BUTTONS[view], "method": "update", "args": [{"visible": visible}, changes]})
    return traced.button_row(buttons, VIEWS.index(x_axis))


def _row(line: _Line, target_loss: float | None) -> Row:
    data, reached = line.run.data, line.reached
    sent = data.sent
    held_out = curves.metric_line(data)[1]
    row: Row = {
        "Run": line.name,
        "Final loss": theme.figure(math.nan if line.final is None and data.steps else line.final),
        curves.metric_title([line.run]): theme.figure(float(held_out[-1]) if len(held_out) else None),
        "Samples": f"{int(data.samples.sum()):,}",
        "Time (s)": theme.number(float(data.training_seconds[-1])),
        "Sent": "–" if np.isnan(sent).all() else traced.format_bytes(float(np.nansum(sent))),
    }
    if target_loss is not None:
        heading = f"To a loss of {theme.number(target_loss)}"
        row |= {
            f"{heading}: samples": f"{reached.samples:,}" if reached else "–",
            "time (s)": theme.number(reached.seconds if reached else None),
            "sent": traced.format_bytes(reached.bytes) if reached and reached.bytes is not None else "–",
        }
    return row
