"""The timeline of a pipeline: as its ranks computed one step, and as simulated from its schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from labkit.experiment.schedules import Schedule
from labkit.plots import theme, traced
from labkit.plots.picture import Picture
from labkit.plots.shown import LabeledRun
from labkit.runs.pipeline import Action, Bubble, first_pipeline, median_durations, simulate, span

KINDS = {"F": "Forward", "B": "Backward", "I": "Backward, inputs", "W": "Backward, weights"}
MAX_ACTIONS = 4000
"""Maximum number of boxes; with more, a box would be narrower than a pixel."""
_UPPER, _LOWER = [0.56, 0.95], [0.04, 0.43]


def finding(schedule: Schedule, bubble: Bubble) -> str:
    """Return the headline with the bubbles: measured, the schedule's own, and by the textbook formula."""
    textbook = f", {traced.percent(bubble.textbook)} with even stages (textbook)" if bubble.textbook is not None else ""
    steps = "these steps" if schedule.asynchronous else "the step"
    return (
        f"{schedule.name}: ranks were idle for {traced.percent(bubble.measured)} of {steps}; the schedule's own bubble "
        f"is {traced.percent(bubble.own)}{textbook}"
    )


def timeline(run: Any) -> Picture:
    """Plot the pipeline of a step, one row per rank: as measured (above) and as simulated (below).

    Colour and pattern distinguish forward from backward passes. The simulation keeps each rank's order and gives each
    action the median time of its stage and kind; messages take no time. Of an asynchronous pipeline (pipedream) the
    traced step and those right before it are shown, by mini-batch.
    """
    labeled_run = LabeledRun.of(run)
    idle = traced.bubble_of(labeled_run)
    if idle is None or labeled_run.experiment is None:
        return traced.empty_picture("No timeline to show: it takes a pipeline (pp above 1) and 1 traced step")
    layout = labeled_run.experiment.layout
    measured = first_pipeline(labeled_run.data.timeline, layout)
    start = min(row[0].begin for row in measured.values())
    shifted = {
        rank: [action._replace(begin=action.begin - start, end=action.end - start) for action in row]
        for rank, row in measured.items()
    }
    simulated = simulate(measured)
    sentence = finding(layout.order, idle)
    with_stage = layout.stages_per_rank > 1
    traces = [
        *_boxes(shifted, with_stage, {"xaxis": "x", "yaxis": "y"}),
        *_boxes(simulated, with_stage, {"xaxis": "x2", "yaxis": "y2", "showlegend": False}),
    ]
    longest = 1000 * max(span(shifted), span(simulated))
    labels = [f"rank {rank}" for rank in measured]
    x_axis = {"range": [0, 1.01 * longest], "domain": [0, 1], "showgrid": False}
    y_axis: dict[str, Any] = {"type": "category", "categoryorder": "array", "categoryarray": labels[::-1]}
    y_axis |= {"ticks": "", "showgrid": False}
    figure_layout = traced.layout(
        sentence,
        barmode="overlay",
        bargap=0.18,
        xaxis=theme.axis("", anchor="y", showticklabels=False, ticks="", **x_axis),
        xaxis2=theme.axis("Time since the first forward pass (ms)", anchor="y2", matches="x", **x_axis),
        yaxis=theme.axis("", anchor="x", domain=_UPPER, **y_axis),
        yaxis2=theme.axis("", anchor="x2", domain=_LOWER, **y_axis),
        shapes=[*_backdrop(len(labels), span(shifted), "x", "y"), *_backdrop(len(labels), span(simulated), "x2", "y2")],
        annotations=[
            traced.heading(
                f"Measured: {traced.percent(idle.measured)} bubble, {theme.number(1000 * idle.measured_seconds)} ms",
                0,
                _UPPER[1],
            ),
            traced.heading(
                f"The schedule alone: {traced.percent(idle.own)} bubble, {theme.number(1000 * idle.own_seconds)} ms",
                0,
                _LOWER[1],
            ),
        ],
        uniformtext={"minsize": 9, "mode": "hide"},
        height=260 + 76 * min(len(labels), 16),
        legend={"y": 1, "x": 1, "xanchor": "right"},
    )
    return Picture(traces, figure_layout, summary=f"{sentence}.", rows=_table_rows(measured))


def _boxes(rows: Mapping[int, Sequence[Action]], with_stage: bool, panel_axes: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one trace per kind; boxes are numbered by micro-batch, with the stage in front if a rank has several."""
    actions = [(rank, action) for rank, row in rows.items() for action in row][:MAX_ACTIONS]
    traces = []
    for index, (kind, title) in enumerate(KINDS.items()):
        of_kind = [(rank, action) for rank, action in actions if action.kind == kind]
        if not of_kind:
            continue
        traces.append(
            traced.bar_trace(
                index,
                title,
                [1000 * action.seconds for _, action in of_kind],
                y=[f"rank {rank}" for rank, _ in of_kind],
                base=[1000 * action.begin for _, action in of_kind],
                text=[f"{a.stage}·{a.microbatch}" if with_stage else str(a.microbatch) for _, a in of_kind],
                textposition="inside",
                insidetextanchor="middle",
                textangle=0,
                textfont={"color": "#ffffff" if kind != "W" else theme.INK, "size": 12},
                customdata=[[a.stage, a.microbatch] for _, a in of_kind],
                hovertemplate="%{y}, stage %{customdata[0]}, microbatch %{customdata[1]}: from %{base:.2f} ms, "
                f"%{{x:.2f}} ms<extra>{title}</extra>",
                legendgroup=kind,
                **panel_axes,
            )
        )
        # Edges separate neighbouring boxes; a strong pattern would make the white numbers hard to read.
        traces[-1]["marker"]["line"] = {"color": "#ffffff", "width": 1}
        traces[-1]["marker"]["pattern"]["fgopacity"] = 0.3
    return traces


def _backdrop(ranks: int, seconds: float, x: str, y: str) -> list[dict[str, Any]]:
    """Return grey bars over the whole span; what no box covers is the bubble."""
    return [
        {
            "type": "rect",
            "xref": x,
            "yref": y,
            "x0": 0,
            "x1": 1000 * seconds,
            "y0": rank - 0.41,
            "y1": rank + 0.41,
            "fillcolor": theme.FAINT,
            "line": {"width": 0},
            "layer": "below",
        }
        for rank in range(ranks)
    ]


def _table_rows(rows: Mapping[int, Sequence[Action]]) -> list[dict[str, Any]]:
    """Return a row per rank, stage and kind: number, median duration, and share of the span."""
    medians, total_span = median_durations(rows), span(rows)
    table_rows = []
    for rank, row in rows.items():
        for stage, kind in sorted({(action.stage, action.kind) for action in row}):
            selected = [action for action in row if (action.stage, action.kind) == (stage, kind)]
            busy_seconds = sum(action.seconds for action in selected)
            table_rows.append(
                {
                    "Rank": rank,
                    "Stage": stage,
                    "Computes": KINDS[kind],
                    "Microbatches": len(selected),
                    "Each (ms, median)": theme.number(1000 * medians[stage, kind]),
                    "Of the span": traced.percent(busy_seconds / total_span) if total_span else "–",
                }
            )
    return table_rows
