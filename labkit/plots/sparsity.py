"""Sparsity over time: the fraction of weights that is zero, how much of the mask changes, and layer by layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from labkit.plots import theme, traced, wording
from labkit.plots.picture import Picture, Row
from labkit.plots.shown import LabeledRun, labeled_runs

_SCALE = [[0.0, theme.PAPER], [0.5, theme.PALETTE[5]], [1.0, theme.PALETTE[0]]]
MAX_COLUMNS = 60
"""Maximum number of changes of the masks in the figure of layers; more are sampled."""


def zeros(layers: dict[str, tuple[int, int, float]]) -> float:
    """Return the fraction of all these weights that is zero."""
    return sum(count for count, _, _ in layers.values()) / sum(size for _, size, _ in layers.values())


def churn(layers: dict[str, tuple[int, int, float]]) -> float:
    """Return the fraction of the kept weights that the last change of the masks has added."""
    kept = {name: size - count for name, (count, size, _) in layers.items()}
    total = sum(kept.values())
    return sum(kept[name] * part for name, (_, _, part) in layers.items()) / total if total else 0.0


def sparsity(runs: Iterable[Any] | Any) -> Picture:
    """Plot zeros as counted (left) and the fraction of kept weights that is new (right), one line per run."""
    labeled = [run for run in labeled_runs(runs) if run.data.sparsity]
    if not labeled:
        return traced.empty_picture("No sparsity to show: 0 runs made weights zero (sparsity.method does)")
    names = traced.run_names(labeled)
    traces: list[dict[str, Any]] = []
    rows: list[Row] = []
    for index, (name, run) in enumerate(zip(names, labeled, strict=True)):
        steps = [step for step, _ in run.data.sparsity]
        zero_percent = [100 * zeros(layers) for _, layers in run.data.sparsity]
        new_percent = [100 * churn(layers) for _, layers in run.data.sparsity]
        colour, dash, marker = theme.style(index)
        line = {
            "x": steps,
            "name": theme.safe(name),
            "legendgroup": str(index),
            "mode": "lines+markers",
            "line": {"color": colour, "dash": dash, "shape": "hv"},
            "marker": {"symbol": marker, "size": 6},
        }
        traces.append(line | {"y": zero_percent, "hovertemplate": "step %{x}: %{y:.1f} % zero"})
        right_panel = {
            "xaxis": "x2",
            "yaxis": "y2",
            "showlegend": False,
            "hovertemplate": "step %{x}: %{y:.1f} % new",
        }
        traces.append(line | right_panel | {"x": steps[1:-1] or steps, "y": new_percent[1:-1] or new_percent})
        rows.append(
            {
                "Run": name,
                "Weights that may be zero": f"{sum(size for _, size, _ in run.data.sparsity[-1][1].values()):,}",
                "Zero at the end": f"{zero_percent[-1]:.1f} %",
                "Changes": f"{sum(value > 0 for value in new_percent):,}",
                "New in a change, at most": f"{max(new_percent):.1f} %",
            }
        )
    sentence = wording.opening(_finding(names, labeled))
    layout = traced.layout(
        sentence,
        xaxis=theme.axis("Optimizer step", domain=[0, 0.45]),
        yaxis=theme.axis("Weights that are zero (%)", range=[0, 102]),
        xaxis2=theme.axis("Optimizer step", domain=[0.58, 1], anchor="y2"),
        yaxis2=theme.axis("New among the kept weights (%)", anchor="x2", rangemode="tozero"),
        height=400,
    )
    return Picture(traces, layout, summary=f"{sentence}.", rows=rows)


def _finding(names: list[str], labeled: list[LabeledRun]) -> str:
    ends = [zeros(run.data.sparsity[-1][1]) for run in labeled]
    index = int(np.argmax(ends))
    if len(labeled) > 1 and max(ends) - min(ends) < 0.005:
        return f"All {len(labeled)} runs end with {traced.percent(ends[index])} of their weights at zero"
    sentence = f"{names[index]} ends with {traced.percent(ends[index])} of its weights at zero"
    return sentence if len(labeled) == 1 else f"{sentence}, the most of {len(labeled)} runs"


def sparse_layers(run: Any) -> Picture:
    """Plot the fraction of zeros of each weight over the steps of one run."""
    labeled_run = LabeledRun.of(run)
    if not labeled_run.data.sparsity:
        return traced.empty_picture("No layers to show: it takes a run that makes weights zero (sparsity.method)")
    chosen = np.unique(np.linspace(0, len(labeled_run.data.sparsity) - 1, MAX_COLUMNS).round().astype(int))
    steps = [labeled_run.data.sparsity[change][0] for change in chosen]
    names = list(labeled_run.data.sparsity[-1][1])
    table = np.full((len(names), len(steps)), np.nan)
    for column, change in enumerate(chosen):
        for row, name in enumerate(names):
            count, size, _ = labeled_run.data.sparsity[change][1].get(name, (0, 0, 0.0))
            table[row, column] = 100 * count / size if size else np.nan
    last = table[:, -1]
    sparsest, densest = int(np.nanargmax(last)), int(np.nanargmin(last))
    sentence = f"{names[sparsest]} ends sparsest, with {last[sparsest]:.0f} % zeros"
    if last[sparsest] - last[densest] >= 1:
        sentence += f"; {names[densest]} keeps most, with {last[densest]:.0f} %"
    else:
        sentence = f"All layers end with about {last[sparsest]:.0f} % zeros"
    trace: dict[str, Any] = {
        "type": "heatmap",
        "z": table,
        "x": [str(step) for step in steps],
        "y": [theme.safe(name) for name in names],
        "zmin": 0,
        "zmax": 100,
        "colorscale": _SCALE,
        "colorbar": {"title": {"text": "Zero (%)", "side": "right"}, "outlinewidth": 0, "thickness": 14},
        "hovertemplate": "%{y} after step %{x}: %{z:.1f} % zero<extra></extra>",
    }
    layout = theme.layout(
        sentence,
        xaxis=theme.axis("Optimizer step", type="category", showgrid=False, nticks=10),
        yaxis=theme.axis("", type="category", showgrid=False, ticks="", autorange="reversed"),
        height=150 + 22 * min(len(names), 40),
    )
    rows: list[Row] = [
        {
            "Layer": name,
            "Weights": f"{labeled_run.data.sparsity[-1][1][name][1]:,}",
            "Zero": f"{table[row, -1]:.1f} %",
        }
        for row, name in enumerate(names)
    ]
    return Picture([trace], layout, summary=f"{sentence}.", rows=rows)
