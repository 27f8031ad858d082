"""Pipeline schedules side by side: how long a step takes, how much of it is bubble, what it costs in memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from labkit.plots import theme, traced
from labkit.plots.picture import Picture
from labkit.plots.shown import shown

_PANELS = ([0.0, 0.29], [0.355, 0.645], [0.71, 1.0])


def finding(names: list[str], steps: list[float | None]) -> str:
    """Which one is fastest, and by how much."""
    known = [(step, name) for step, name in zip(steps, names, strict=True) if step]
    if len(known) < 2:
        return f"{names[0]}: {theme.number(steps[0])} ms a step"
    (least, fastest), (most, slowest) = min(known), max(known)
    return f"{fastest} is the fastest: {most / least:.2f} times as fast as {slowest}"


def schedules(runs: Iterable[Any] | Any) -> Picture:
    """One row a run with a pipeline: step time, bubble (measured and the schedule's own), peak of the activations."""
    many = [one for one in shown(runs) if traced.bubble_of(one) is not None]
    if not many:
        return traced.nothing("No schedules to compare: 0 runs have traced a pipeline (pp above 1)")
    names = traced.names(many)
    labels = [theme.safe(name) for name in names]
    bubbles = [found for one in many if (found := traced.bubble_of(one)) is not None]
    steps = [traced.step_ms(one) for one in many]
    peaks = [max((sizes.get("activations", 0) for sizes in one.data.memory.values()), default=0) for one in many]
    per, unit = traced.unit(max(peaks))
    sentence = finding(names, steps)
    largest = 100 * max(max(found.measured, found.own, found.textbook or 0) for found in bubbles)

    traces = [
        traced.bars(
            0,
            "Step",
            steps,
            y=labels,
            showlegend=False,
            hovertemplate="%{y}: %{x:.3~g} ms a step<extra></extra>",
            **traced.outside([theme.number(step) for step in steps]),
        ),
        traced.bars(
            1,
            "Bubble, measured",
            [100 * found.measured for found in bubbles],
            y=labels,
            xaxis="x2",
            yaxis="y2",
            hovertemplate="%{y}: %{x:.1f} %<extra>measured</extra>",
        ),
        {
            "type": "scatter",
            "mode": "text",
            "x": [1.12 * largest] * len(many),
            "y": labels,
            "xaxis": "x2",
            "yaxis": "y2",
            "text": [f"{traced.percent(found.measured)} ({traced.percent(found.own)})" for found in bubbles],
            "textposition": "middle right",
            "hoverinfo": "skip",
            "showlegend": False,
        },
        _markers("The schedule's own", labels, [100 * found.own for found in bubbles], "diamond", theme.PALETTE[4]),
        _markers(
            "Textbook, even stages",
            labels,
            [None if found.textbook is None else 100 * found.textbook for found in bubbles],
            "line-ns",
            theme.INK,
        ),
        traced.bars(
            2,
            "Activations",
            [peak / per for peak in peaks],
            y=labels,
            xaxis="x3",
            yaxis="y3",
            showlegend=False,
            hovertemplate=f"%{{y}}: %{{x:.3~g}} {unit}<extra>largest rank</extra>",
            **traced.outside([theme.number(peak / per) for peak in peaks]),
        ),
    ]
    down = {"type": "category", "autorange": "reversed", "ticks": "", "showgrid": False}
    layout = traced.layout(
        sentence,
        bargap=0.35,
        xaxis=theme.axis("Step (ms, median)", domain=_PANELS[0], range=traced.room(steps), nticks=5),
        xaxis2=theme.axis(
            "Bubble (%): measured (own)", domain=_PANELS[1], anchor="y2", range=[0, 2.2 * largest], nticks=5
        ),
        xaxis3=theme.axis(
            f"Activations ({unit})",
            domain=_PANELS[2],
            anchor="y3",
            range=traced.room([peak / per for peak in peaks]),
            nticks=5,
        ),
        yaxis=theme.axis("", **down),
        yaxis2=theme.axis("", anchor="x2", showticklabels=False, **down),
        yaxis3=theme.axis("", anchor="x3", showticklabels=False, **down),
        height=190 + 46 * min(len(many), 24),
        legend={"x": _PANELS[1][0]},
    )
    rows = [
        {
            "Run": name,
            "Step (ms)": theme.number(step),
            "Bubble, measured": traced.percent(found.measured),
            "The schedule's own": traced.percent(found.own),
            "Textbook": "–" if found.textbook is None else traced.percent(found.textbook),
            "Activations": traced.size(peak),
        }
        for name, step, found, peak in zip(names, steps, bubbles, peaks, strict=True)
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
