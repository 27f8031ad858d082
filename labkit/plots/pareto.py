"""What accuracy costs: one point a run, and the front of those that no other run beats in both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from labkit.plots import theme, traced
from labkit.plots.picture import Picture, Row
from labkit.plots.shown import LabeledRun, shown
from labkit.runs.checked import NOT_FINITE

COSTS: dict[str, tuple[str, str]] = {
    "time": ("Training time (s)", "s"),
    "energy": ("Processor time of all ranks, a proxy for energy (rank-seconds)", "rank-s"),
    "memory": ("Peak memory of a rank (MB)", "MB"),
}


def cost_of(one: LabeledRun, cost: str) -> float | None:
    """What a run cost: `time`, `energy` (ranks times seconds) or `memory`; None where that is not known."""
    if cost == "memory":
        peaks = list(one.data.peak_memory.values())
        return max(peaks) / 1e6 if peaks else None
    seconds = float(one.data.training_seconds[-1]) if one.data.steps else None
    return seconds if seconds is None or cost == "time" else seconds * one.world_size


def gain_of(one: LabeledRun) -> float | None:
    """The metric of the last evaluation; NaN where it is not finite."""
    key = one.data.metric.get("key")
    return one.data.evaluations[-1][2].get(key) if key and one.data.evaluations else None


def front(points: list[tuple[float, float]], higher: bool) -> list[int]:
    """Which points (cost, gain) no other one beats: none costs less and gains as much or more; by rising cost."""
    better: Callable[[float, float], bool] = (lambda a, b: a > b) if higher else (lambda a, b: a < b)
    found: list[int] = []
    for at in sorted(range(len(points)), key=lambda at: (points[at][0], -points[at][1] if higher else points[at][1])):
        if not found or better(points[at][1], points[found[-1]][1]):
            found.append(at)
    return found


def pareto(runs: Iterable[Any] | Any, cost: str = "time") -> Picture:
    """Held-out metric of each run against what it cost: `time`, `energy` or `memory`.

    Runs without both are left out. ValueError for another cost.
    """
    if cost not in COSTS:
        raise ValueError(f"cost {cost!r} is not one of {', '.join(COSTS)}")
    evaluated = [(run, cost_of(run, cost), gain_of(run)) for run in shown(runs) if not run.is_ceiling]
    measured = [(run, paid, gain) for run, paid, gain in evaluated if paid is not None and gain is not None]
    compared = [(run, paid, gain) for run, paid, gain in measured if math.isfinite(gain)]
    diverged = len(measured) - len(compared)
    left_out = f"; left out, since their metric is {NOT_FINITE}: {diverged}" if diverged else ""
    if not compared:
        return traced.nothing(f"No Pareto front to show: 0 runs have both a metric and a cost{left_out}")
    about = compared[0][0].data.metric
    higher, unit = bool(about.get("higher_is_better", True)), str(about.get("unit", ""))
    scale = 100.0 if unit == "%" else 1.0
    points = [(paid, scale * gain) for _, paid, gain in compared]
    # What reads alike is alike: nobody pays for the sixth digit of an accuracy.
    best = front([(paid, float(f"{gain:.4g}")) for paid, gain in points], higher)
    names = traced.names([run for run, _, _ in compared])
    top = best[-1]
    title, short = COSTS[cost]
    sentence = (
        f"{len(best)} of {len(compared)} runs {'is' if len(best) == 1 else 'are'} worth "
        f"{'its' if len(best) == 1 else 'their'} cost; {names[top]} gets furthest, "
        f"{theme.number(points[top][1])}{' %' if unit == '%' else ''} for {theme.number(points[top][0])} {short}"
        f"{left_out}"
    )
    rest = [at for at in range(len(compared)) if at not in best]
    metric = str(about.get("title") or about.get("key"))
    traces: list[dict[str, Any]] = []
    for places, label, colour, symbol, mode in (
        (rest, "beaten by another run", theme.MUTED, "circle-open", "markers"),
        (best, "no run is better and cheaper", theme.PALETTE[1], "diamond", "lines+markers"),
    ):
        traces.append(
            {
                "x": np.array([points[at][0] for at in places]),
                "y": np.array([points[at][1] for at in places]),
                "text": [theme.safe(names[at]) for at in places],
                "name": label,
                "mode": mode,
                "marker": {"symbol": symbol, "size": 11, "color": colour},
                "line": {"color": colour, "dash": "dot", "shape": "hv"},
                "hovertemplate": "%{text}<br>%{y:.4~g} for %{x:.4~g} " + short + "<extra></extra>",
            }
        )
    layout = traced.layout(
        sentence,
        xaxis=theme.axis(title, rangemode="tozero"),
        yaxis=theme.axis(f"{metric} (%)" if unit == "%" else metric),
        height=440,
    )
    rows: list[Row] = [
        {
            "Run": names[at],
            metric: f"{points[at][1]:.4g}{' %' if unit == '%' else ''}",
            title: theme.number(points[at][0]),
            "On the front": "yes" if at in best else "",
            "Run id": compared[at][0].data.directory.id,
        }
        for at in sorted(range(len(compared)), key=lambda at: points[at][0])
    ]
    return Picture(traces, layout, summary=f"{sentence}.", rows=rows)
