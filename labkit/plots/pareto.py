"""Pareto front of accuracy and cost: one point per run, and the runs that no other run beats in both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from labkit.plots import theme, traced
from labkit.plots.picture import Picture, Row
from labkit.plots.shown import LabeledRun, labeled_runs
from labkit.runs.checked import NOT_FINITE

COSTS: dict[str, tuple[str, str]] = {
    "time": ("Training time (s)", "s"),
    "energy": ("Processor time of all ranks, a proxy for energy (rank-seconds)", "rank-s"),
    "memory": ("Peak memory of a rank (MB)", "MB"),
}


def cost_of(run: LabeledRun, cost: str) -> float | None:
    """Return the cost of a run: `time` (s), `energy` (ranks × s) or `memory` (MB); None if it is unknown."""
    if cost == "memory":
        peaks = list(run.data.peak_memory.values())
        return max(peaks) / 1e6 if peaks else None
    seconds = float(run.data.training_seconds[-1]) if run.data.steps else None
    return seconds if seconds is None or cost == "time" else seconds * run.world_size


def gain_of(run: LabeledRun) -> float | None:
    """Return the metric of the last evaluation; NaN if it is not finite, None if there is none."""
    key = run.data.metric.get("key")
    return run.data.evaluations[-1][2].get(key) if key and run.data.evaluations else None


def front(points: list[tuple[float, float]], higher: bool) -> list[int]:
    """Return the indices of the points (cost, gain) on the Pareto front, by ascending cost."""
    better: Callable[[float, float], bool] = (lambda a, b: a > b) if higher else (lambda a, b: a < b)
    best: list[int] = []
    for index in sorted(
        range(len(points)), key=lambda index: (points[index][0], -points[index][1] if higher else points[index][1])
    ):
        if not best or better(points[index][1], points[best[-1]][1]):
            best.append(index)
    return best


def pareto(runs: Iterable[Any] | Any, cost: str = "time") -> Picture:
    """Plot the held-out metric of each run against its cost: `time`, `energy` or `memory`.

    Runs without a metric or a cost are left out. Raises ValueError for another cost.
    """
    if cost not in COSTS:
        raise ValueError(f"cost {cost!r} is not one of {', '.join(COSTS)}")
    evaluated = [(run, cost_of(run, cost), gain_of(run)) for run in labeled_runs(runs) if not run.is_ceiling]
    measured = [(run, spent, gain) for run, spent, gain in evaluated if spent is not None and gain is not None]
    compared = [(run, spent, gain) for run, spent, gain in measured if math.isfinite(gain)]
    diverged = len(measured) - len(compared)
    left_out = f"; left out, since their metric is {NOT_FINITE}: {diverged}" if diverged else ""
    if not compared:
        return traced.empty_picture(f"No Pareto front to show: 0 runs have both a metric and a cost{left_out}")
    metric_info = compared[0][0].data.metric
    higher, unit = bool(metric_info.get("higher_is_better", True)), str(metric_info.get("unit", ""))
    scale = 100.0 if unit == "%" else 1.0
    points = [(spent, scale * gain) for _, spent, gain in compared]
    # Values that look equal count as equal: the sixth digit of an accuracy is not worth paying for.
    best = front([(spent, float(f"{gain:.4g}")) for spent, gain in points], higher)
    names = traced.run_names([run for run, _, _ in compared])
    best_run = best[-1]
    title, cost_unit = COSTS[cost]
    sentence = (
        f"{len(best)} of {len(compared)} runs {'is' if len(best) == 1 else 'are'} worth "
        f"{'its' if len(best) == 1 else 'their'} cost; {names[best_run]} does best, "
        f"{theme.number(points[best_run][1])}{' %' if unit == '%' else ''} "
        f"for {theme.number(points[best_run][0])} {cost_unit}{left_out}"
    )
    beaten = [index for index in range(len(compared)) if index not in best]
    metric = str(metric_info.get("title") or metric_info.get("key"))
    traces: list[dict[str, Any]] = []
    for indices, label, colour, symbol, mode in (
        (beaten, "beaten by another run", theme.MUTED, "circle-open", "markers"),
        (best, "no run is better and cheaper", theme.PALETTE[1], "diamond", "lines+markers"),
    ):
        traces.append(
            {
                "x": np.array([points[index][0] for index in indices]),
                "y": np.array([points[index][1] for index in indices]),
                "text": [theme.safe(names[index]) for index in indices],
                "name": label,
                "mode": mode,
                "marker": {"symbol": symbol, "size": 11, "color": colour},
                "line": {"color": colour, "dash": "dot", "shape": "hv"},
                "hovertemplate": "%{text}<br>%{y:.4~g} for %{x:.4~g} " + cost_unit + "<extra></extra>",
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
            "Run": names[index],
            metric: f"{points[index][1]:.4g}{' %' if unit == '%' else ''}",
            title: theme.number(points[index][0]),
            "On the front": "yes" if index in best else "",
            "Run id": compared[index][0].data.directory.id,
        }
        for index in sorted(range(len(compared)), key=lambda index: points[index][0])
    ]
    return Picture(traces, layout, summary=f"{sentence}.", rows=rows)
