"""Comparison of pipeline schedules: step time, bubble and memory of the activations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from labkit.plots import theme, traced
from labkit.plots.picture import Picture
from labkit.plots.shown import labeled_runs

_PANELS = ([0.0, 0.29], [0.355, 0.645], [0.71, 1.0])


def finding(names: list[str], steps: list[float | None]) -> str:
    """Return the headline: the fastest schedule and by how much."""
    measured = [(step, name) for step, name in zip(steps, names, strict=True) if step]
    if len(measured) < 2:
        return f"{names[0]}: {theme.number(steps[0])} ms a step"
    (shortest, fastest), (longest, slowest) = min(measured), max(measured)
    return f"{fastest} is the fastest: {longest / shortest:.2f} times as fast as {slowest}"


def schedules(runs: Iterable[Any] | Any) -> Picture:
    """Plot step time, bubble (measured and the schedule's own) and peak activations, one row per pipeline run."""
    labeled = [run for run in labeled_runs(runs) if traced.bubble_of(run) is not None]
    if not labeled:
        return traced.empty_picture("No schedules to compare: 0 runs have traced a pipeline (pp above 1)")
    names = traced.run_names(labeled)
    labels = [theme.safe(name) for name in names]
    bubbles = [bubble for run in labeled if (bubble := traced.bubble_of(run)) is not None]
    steps = [traced.step_ms(run) for run in labeled]
    peaks = [max((sizes.get("activations", 0) for sizes in run.data.memory.values()), default=0) for run in labeled]
    bytes_per_unit, unit = traced.byte_unit(max(peaks))
    sentence = finding(names, steps)
    largest = 100 * max(max(bubble.measured, bubble.own, bubble.textbook or 0) for bubble in bubbles)

    traces = [
        traced.bar_trace(
            0,
            "Step",
            steps,
            y=labels,
            showlegend=False,
            hovertemplate="%{y}: %{x:.3~g} ms a step<extra></extra>",
            **traced.outside_text([theme.number(step) for step in steps]),
        ),
        traced.bar_trace(
            1,
            "Bubble, measured",
            [100 * bubble.measured for bubble in bubbles],
            y=labels,
            xaxis="x2",
            yaxis="y2",
            hovertemplate="%{y}: %{x:.1f} %<extra>measured</extra>",
        ),
        {
            "type": "scatter",
            "mode": "text",
            "x": [1.12 * largest] * len(labeled),
            "y": labels,
            "xaxis": "x2",
            "yaxis": "y2",
            "text": [f"{traced.percent(bubble.measured)} ({traced.percent(bubble.own)})" for bubble in bubbles],
            "textposition": "middle right",
            "hoverinfo": "skip",
            "showlegend": False,
        },
        _markers("The schedule's own", labels, [100 * bubble.own for bubble in bubbles], "diamond", theme.PALETTE[4]),
        _markers(
            "Textbook, even stages",
            labels,
            [None if bubble.textbook is None else 100 * bubble.textbook for bubble in bubbles],
            "line-ns",
            theme.INK,
        ),
        traced.bar_trace(
            2,
            "Activations",
            [peak / bytes_per_unit for peak in peaks],
            y=labels,
            xaxis="x3",
            yaxis="y3",
            showlegend=False,
            hovertemplate=f"%{{y}}: %{{x:.3~g}} {unit}<extra>largest rank</extra>",
            **traced.outside_text([theme.number(peak / bytes_per_unit) for peak in peaks]),
        ),
    ]
    y_axis = {"type": "category", "autorange": "reversed", "ticks": "", "showgrid": False}
    layout = traced.layout(
        sentence,
        bargap=0.35,
        xaxis=theme.axis("Step (ms, median)", domain=_PANELS[0], range=traced.axis_range(steps), nticks=5),
        xaxis2=theme.axis(
            "Bubble (%): measured (own)", domain=_PANELS[1], anchor="y2", range=[0, 2.2 * largest], nticks=5
        ),
        xaxis3=theme.axis(
            f"Activations ({unit})",
            domain=_PANELS[2],
            anchor="y3",
            range=traced.axis_range([peak / bytes_per_unit for peak in peaks]),
            nticks=5,
        ),
        yaxis=theme.axis("", **y_axis),
        yaxis2=theme.axis("", anchor="x2", showticklabels=False, **y_axis),
        yaxis3=theme.axis("", anchor="x3", showticklabels=False, **y_axis),
        height=190 + 46 * min(len(labeled), 24),
        legend={"x": _PANELS[1][0]},
    )
    rows = [
        {
            "Run": name,
            "Step (ms)": theme.number(step),
            "Bubble, measured": traced.percent(bubble.measured),
            "The schedule's own": traced.percent(bubble.own),
            "Textbook": "–" if bubble.textbook is None else traced.percent(bubble.textbook),
            "Activations": traced.format_bytes(peak),
        }
        for name, step, bubble, peak in zip(names, steps, bubbles, peaks, strict=True)
    ]
    return Picture(traces, layout, summary=f"{sentence}.", rows=rows)


def _markers(name: str, labels: list[str], values: list[float | None], symbol: str, colour: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": values,
        "y": labels,
        "xaxis": "x2",
        "yaxis": "y2",
        "marker": {
            "symbol": symbol,
            "size": 12 if symbol == "diamond" else 20,
            "color": colour,
            "line": {"color": theme.INK, "width": 1.2 if symbol == "diamond" else 2.5},
        },
        "hovertemplate": f"%{{y}}: %{{x:.1f}} %<extra>{name}</extra>",
    }
