"""The pipeline of one update as its ranks computed it, and below it the same order of work with nothing in its way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from labkit.plots import theme, traced
from labkit.plots.picture import Picture
from labkit.plots.shown import LabeledRun
from labkit.runs.pipeline import Action, Bubble, first_pipeline, median_durations, schedule_name, simulate, span

KINDS = {"F": "Forward", "B": "Backward", "I": "Backward, inputs", "W": "Backward, weights"}
MAX_ACTIONS = 4000
"""Beyond that a box has no pixel left."""
_UPPER, _LOWER = [0.56, 0.95], [0.04, 0.43]


def finding(schedule: str, found: Bubble) -> str:
    """The bubbles, named: measured, the schedule's own, the textbook's."""
    book = f", {traced.percent(found.textbook)} with even stages (textbook)" if found.textbook is not None else ""
    which = "these updates" if schedule == "pipedream" else "the update"
    return (
        f"{schedule}: ranks stood still for {traced.percent(found.measured)} of {which}; the schedule's own bubble "
        f"is {traced.percent(found.own)}{book}"
    )


def timeline(run: Any) -> Picture:
    """One row a rank: above, what was measured; below, the ideal. Colour and pattern tell forward from backward.

    Of an asynchronous pipeline (pipedream) the traced update and those right before it are shown, by minibatch.

    The ideal keeps each rank's order and gives each action the median time of its stage and kind, messages free.
    """
    one = LabeledRun.of(run)
    found = traced.bubble_of(one)
    if found is None or one.experiment is None:
        return traced.nothing("No timeline to show: it takes a pipeline (pp above 1) and 1 traced update")
    layout = one.experiment.layout
    measured = first_pipeline(one.data.timeline, layout)
    begun = min(row[0].begin for row in measured.values())
    shifted = {
        rank: [action._replace(begin=action.begin - begun, end=action.end - begun) for action in row]
        for rank, row in measured.items()
    }
    simulated = simulate(measured)
    sentence = finding(schedule_name(one.experiment), found)
    several = layout.stages_per_rank > 1
    traces = [
        *_boxes(shifted, several, {"xaxis": "x", "yaxis": "y"}),
        *_boxes(simulated, several, {"xaxis": "x2", "yaxis": "y2", "showlegend": False}),
    ]
    longest = 1000 * max(span(shifted), span(simulated))
    labels = [f"rank {rank}" for rank in measured]
    across = {"range": [0, 1.01 * longest], "domain": [0, 1], "showgrid": False}
    down: dict[str, Any] = {"type": "category", "categoryorder": "array", "categoryarray": labels[::-1]}
    down |= {"ticks": "", "showgrid": False}
    picture = traced.layout(
        sentence,
        barmode="overlay",
        bargap=0.18,
        xaxis=theme.axis("", anchor="y", showticklabels=False, ticks="", **across),
        xaxis2=theme.axis("Time since the first forward pass (ms)", anchor="y2", matches="x", **across),
        yaxis=theme.axis("", anchor="x", domain=_UPPER, **down),
        yaxis2=theme.axis("", anchor="x2", domain=_LOWER, **down),
        shapes=[*_backdrop(len(labels), span(shifted), "x", "y"), *_backdrop(len(labels), span(simulated), "x2", "y2")],
        annotations=[
            traced.heading(
                f"Measured: {traced.percent(found.measured)} bubble, {theme.number(1000 * found.measured_seconds)} ms",
                0,
                _UPPER[1],
            ),
            traced.heading(
                f"The schedule alone: {traced.percent(found.own)} bubble, {theme.number(1000 * found.own_seconds)} ms",
                0,
                _LOWER[1],
            ),
        ],
        uniformtext={"minsize": 9, "mode": "hide"},
        height=260 + 76 * min(len(labels), 16),
        legend={"y": 1, "x": 1, "xanchor": "right"},
    )
    return Picture(traces, picture, summary=f"{sentence}.", rows=_twin(measured))


def _boxes(rows: Mapping[int, Sequence[Action]], several: bool, place: dict[str, Any]) -> list[dict[str, Any]]:
    """One trace a kind; the number in a box is its microbatch, with the stage before it where a rank has several."""
    actions = [(rank, action) for rank, row in rows.items() for action in row][:MAX_ACTIONS]
    traces = []
    for index, (kind, title) in enumerate(KINDS.items()):
        mine = [(rank, action) for rank, action in actions if action.kind == kind]
        if not mine:
            continue
        traces.append(
            traced.bars(
                index,
                title,
                [1000 * action.seconds for _, action in mine],
                y=[f"rank {rank}" for rank, _ in mine],
                base=[1000 * action.begin for _, action in mine],
                text=[f"{a.stage}·{a.microbatch}" if several else str(a.microbatch) for _, a in mine],
                textposition="inside",
                insidetextanchor="middle",
                textangle=0,
                textfont={"color": "#ffffff" if kind != "W" else theme.INK, "size": 12},
                customdata=[[a.stage, a.microbatch] for _, a in mine],
                hovertemplate="%{y}, stage %{customdata[0]}, microbatch %{customdata[1]}: from %{base:.2f} ms, "
                f"%{{x:.2f}} ms<extra>{title}</extra>",
                legendgroup=kind,
                **place,
            )
        )
        # Edges keep neighbouring boxes apart; the pattern would make the numbers hard to read in white.
        traces[-1]["marker"]["line"] = {"color": "#ffffff", "width": 1}
        traces[-1]["marker"]["pattern"]["fgopacity"] = 0.3
    return traces


def _backdrop(ranks: int, seconds: float, x: str, y: str) -> list[dict[str, Any]]:
    """What no box covers is the bubble: grey, from the begin of the span to its end."""
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


def _twin(rows: Mapping[int, Sequence[Action]]) -> list[dict[str, Any]]:
    """By rank, stage and kind: how many, how long each (median), and their share of the span."""
    middle, whole = median_durations(rows), span(rows)
    found = []
    for rank, row in rows.items():
        for stage, kind in sorted({(action.stage, action.kind) for action in row}):
            mine = [action for action in row if (action.stage, action.kind) == (stage, kind)]
            busy = sum(action.seconds for action in mine)
            found.append(
                {
                    "Rank": rank,
                    "Stage": stage,
                    "Computes": KINDS[kind],
                    "Microbatches": len(mine),
                    "Each (ms, median)": theme.number(1000 * middle[stage, kind]),
                    "Of the span": traced.percent(busy / whole) if whole else "–",
                }
            )
    return found
