"""The overview figure: loss, held-out metric, throughput and speed-up of a few runs in four panels.

The live dashboard and saved notebooks draw this same figure. The traces have a fixed order (`SLOTS` runs, then the
speed-up), so that a live redraw only replaces arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from labkit.plots import curves, speedup, theme
from labkit.plots.against import TITLES, checked_x_axis
from labkit.plots.picture import Picture
from labkit.plots.shown import LabeledRun, labeled_runs
from labkit.plots.table import runs_rows
from labkit.runs.methods import period

SLOTS = 4
X_AXES = ("steps", "time", "bytes")
"""Possible x axes of the curves."""
AXES = ("xaxis", "yaxis", "xaxis2", "yaxis2", "xaxis3", "yaxis3", "xaxis4", "yaxis4")
HEIGHT = 640
_NO_POINTS = (np.zeros(0), np.zeros(0))
_LEFT, _RIGHT, _UPPER, _LOWER = [0.0, 0.455], [0.545, 1.0], [0.60, 0.955], [0.06, 0.415]
_TITLE_CHARACTERS = 50
"""Characters per line of a panel's title."""

Rows = Sequence[Mapping[str, Any]]


def findings(runs: Sequence[LabeledRun], rows: Rows) -> list[str]:
    """Return the headline, without a full stop, of each of the four panels."""
    return [
        curves.loss_finding(runs),
        curves.metric_finding(runs),
        curves.throughput_finding(runs),
        speedup.finding(rows),
    ]


def traces(runs: Sequence[LabeledRun], rows: Rows, x_axis: str = "steps") -> list[dict[str, Any]]:
    """Return 4 × SLOTS lines, then the three traces of the speed-up; free slots have empty lines."""
    line_traces: list[dict[str, Any]] = []
    for slot in range(SLOTS):
        run = runs[slot] if slot < len(runs) else None
        if run is None:
            line_traces += [
                *_no_loss(slot, x_axis),
                *(curves.line(slot, "", _NO_POINTS, "", x_axis, showlegend=False, **_panel_axes(at)) for at in (2, 3)),
            ]
            continue
        losses = _no_loss(slot, x_axis) if run.is_ceiling else curves.loss_traces(slot, run, x_axis, **_panel_axes(1))
        line_traces += losses
        held_out = _NO_POINTS if run.is_ceiling else curves.metric_line(run.data, x_axis)
        line_traces.append(curves.line(slot, run.label, held_out, "", x_axis, **_panel_axes(2), showlegend=False))
        rate = curves.throughput_line(run.data, x_axis)
        line_traces.append(
            curves.line(slot, run.label, rate, " samples/s", x_axis, **_panel_axes(3), showlegend=run.is_ceiling)
        )
    return line_traces + speedup.traces(rows, **_panel_axes(4))


def _no_loss(slot: int, x_axis: str) -> list[dict[str, Any]]:
    """Return the two empty traces of a loss."""
    return [
        curves.faint(slot, "", _NO_POINTS, **_panel_axes(1)),
        curves.line(slot, "", _NO_POINTS, "", x_axis, showlegend=False, **_panel_axes(1)),
    ]


def _panel_axes(panel: int) -> dict[str, str]:
    return {"xaxis": "x" if panel == 1 else f"x{panel}", "yaxis": "y" if panel == 1 else f"y{panel}"}


def titles(sentences: Sequence[str]) -> list[dict[str, Any]]:
    """Return the four headlines as annotations above their panels."""
    panels = [(_LEFT, _UPPER), (_RIGHT, _UPPER), (_LEFT, _LOWER), (_RIGHT, _LOWER)]
    return [
        {
            "text": f"<b>{theme.wrapped(sentence, _TITLE_CHARACTERS)}</b>",
            "x": x_domain[0],
            "y": y_domain[1] + 0.012,
            "xref": "paper",
            "yref": "paper",
            "xanchor": "left",
            "yanchor": "bottom",
            "showarrow": False,
            "align": "left",
            "font": {"size": 13.5, "color": theme.INK},
        }
        for sentence, (x_domain, y_domain) in zip(sentences, panels, strict=True)
    ]


def layout(runs: Sequence[LabeledRun], rows: Rows, height: int = HEIGHT, x_axis: str = "steps") -> dict[str, Any]:
    """Return the layout: axes, titles and legends of the four panels."""
    defaults = {key: value for key, value in theme.LAYOUT.items() if key != "title"}
    x_title = TITLES[x_axis]
    from_zero = {"autorangeoptions": {"clipmin": 0}}
    figure_layout = defaults | {
        "height": height,
        "xaxis": theme.axis(x_title, domain=_LEFT, anchor="y", **from_zero),
        "yaxis": theme.axis("Training loss", domain=_UPPER, anchor="x", **from_zero),
        "xaxis2": theme.axis(x_title, domain=_RIGHT, anchor="y2", matches="x", **from_zero),
        "yaxis2": theme.axis(theme.safe(curves.metric_title(runs)), domain=_UPPER, anchor="x2"),
        "xaxis3": theme.axis(x_title, domain=_LEFT, anchor="y3", matches="x", **from_zero),
        "yaxis3": theme.axis("Throughput (samples/s)", domain=_LOWER, anchor="x3", rangemode="tozero"),
        "xaxis4": theme.axis("", domain=_RIGHT, anchor="y4", type="category"),
        "yaxis4": theme.axis("Speed-up (× 1 rank)", domain=_LOWER, anchor="x4", rangemode="tozero"),
        "annotations": titles(findings(runs, rows)),
        "legend": defaults["legend"] | {"y": 1.06, "traceorder": "normal"},
        "legend2": defaults["legend"] | {"x": 1, "xanchor": "right", "y": _LOWER[0] - 0.075, "yanchor": "top"},
        "showlegend": True,
        "margin": {"l": 60, "r": 16, "t": 56, "b": 48},
        "autosize": True,
    }
    for name in AXES:  # tick labels on an empty axis have no meaning
        figure_layout[name]["showticklabels"] = bool(speedup.bars(rows) if name.endswith("4") else runs)
    return figure_layout


def overview(runs: Iterable[Any] | Any, comparison: Any = (), height: int = HEIGHT, x_axis: str = "steps") -> Picture:
    """Plot loss, held-out metric, throughput and speed-up of the last `SLOTS` of `runs` in one figure.

    `comparison` is the result of `labkit.runs.compare.compare`, or its rows; without it the speed-up stays empty.
    `x_axis` of the curves is steps, time or bytes.
    """
    checked_x_axis(x_axis, *X_AXES)
    labeled = labeled_runs(runs)[-SLOTS:]
    rows = list(getattr(comparison, "rows", comparison))
    sentences = findings(labeled, rows)
    summary = ". ".join(sentences) + "."
    return Picture(
        traces(labeled, rows, x_axis),
        layout(labeled, rows, height, x_axis),
        summary=summary,
        rows=table_rows_of(labeled, rows),
    )


def table_rows_of(runs: Sequence[LabeledRun], rows: Rows) -> list[dict[str, Any]]:
    """Return the table of runs, or without a comparison a table with the last values of the curves."""
    if rows:
        return runs_rows(rows)
    table_rows = []
    for run in runs:
        loss, (_, held_out) = run.data.loss, curves.metric_line(run.data)
        table_rows.append(
            {
                "Run": run.label,
                "State": theme.plain(run.data.state),
                "Steps": run.data.steps,
                "Last loss": theme.figure(float(loss[-1]) if len(loss) else None),
                curves.metric_title([run]): theme.figure(float(held_out[-1]) if len(held_out) else None),
                "Samples/s": theme.number(curves.throughput(run.data, period(run.experiment))),
            }
        )
    return table_rows
