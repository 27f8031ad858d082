"""Which part of the weights is zero: over time, how much of the rest changes, and layer by layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from labkit.plots import theme, traced, wording
from labkit.plots.picture import Picture, Row
from labkit.plots.shown import LabeledRun, shown

_SCALE = [[0.0, theme.PAPER], [0.5, theme.PALETTE[5]], [1.0, theme.PALETTE[0]]]
MAX_COLUMNS = 60
"""More changes than this are thinned out in the picture of layers."""


def zeros(layers: dict[str, tuple[int, int, float]]) -> float:
    """Part of all these weights that is zero."""
    return sum(count for count, _, _ in layers.values()) / sum(size for _, size, _ in layers.values())


def churn(layers: dict[str, tuple[int, int, float]]) -> float:
    """What part of all weights that are kept has come new."""
    kept = {name: size - count for name, (count, size, _) in layers.items()}
    total = sum(kept.values())
    return sum(kept[name] * part for name, (_, _, part) in layers.items()) / total if total else 0.0


def sparsity(runs: Iterable[Any] | Any) -> Picture:
    """Zeros as counted (left) and what part of the kept weights is new after a change (right), a line a run."""
    many = [one for one in shown(runs) if one.data.sparsity]
    if not many:
        return traced.nothing("No sparsity to show: 0 runs made weights zero (sparsity.method does)")
    names = traced.names(many)
    traces: list[dict[str, Any]] = []
    rows: list[Row] = []
    for index, (name, one) in enumerate(zip(names, many, strict=True)):
        steps = [step for step, _ in one.data.sparsity]
        part = [100 * zeros(layers) for _, layers in one.data.sparsity]
        new = [100 * churn(layers) for _, layers in one.data.sparsity]
        colour, dash, marker = theme.style(index)
        line = {
            "x": steps,
            "name": theme.safe(name),
            "legendgroup": str(index),
            "mode": "lines+markers",
            "line": {"color": colour, "dash": dash, "shape": "hv"},
            "marker": {"symbol": marker, "size": 6},
        }
        traces.append(line | {"y": part, "hovertemplate": "update %{x}: %{y:.1f} % zero"})
        shown_right = {
            "xaxis": "x2",
            "yaxis": "y2",
            "showlegend": False,
            "hovertemplate": "update %{x}: %{y:.1f} % new",
        }
        traces.append(line | shown_right | {"x": steps[1:-1] or steps, "y": new[1:-1] or new})
        rows.append(
            {
                "Run": name,
                "Weights that may be zero": f"{sum(size for _, size, _ in one.data.sparsity[-1][1].values()):,}",
                "Zero at the end": f"{part[-1]:.1f} %",
                "Changes": f"{sum(value > 0 for value in new):,}",
                "New in a change, at most": f"{max(new):.1f} %",
            }
        )
    sentence = wording.opening(_finding(names, many))
    layout = traced.layout(
        sentence,
        xaxis=theme.axis("Updates", domain=[0, 0.45]),
        yaxis=theme.axis("Weights that are zero (%)", range=[0, 102]),
        xaxis2=theme.axis("Updates", domain=[0.58, 1], anchor="y2"),
        yaxis2=theme.axis("New among the kept weights (%)", anchor="x2", rangemode="tozero"),
        height=400,
    )
    return Picture(traces, layout, summary=f"{sentence}.", rows=rows)


def _finding(names: list[str], many: list[LabeledRun]) -> str:
    ends = [zeros(one.data.sparsity[-1][1]) for one in many]
    at = int(np.argmax(ends))
    if len(many) > 1 and max(ends) - min(ends) < 0.005:
        return f"All {len(many)} runs end with {traced.percent(ends[at])} of their weights at zero"
    said = f"{names[at]} ends with {traced.percent(ends[at])} of its weights at zero"
    return said if len(many) == 1 else f"{said}, the most of {len(many)} runs"


def sparse_layers(run: Any) -> Picture:
    """Part of each weight that is zero, over the updates of one run."""
    one = LabeledRun.of(run)
    if not one.data.sparsity:
        return traced.nothing("No layers to show: it takes a run that makes weights zero (sparsity.method)")
    chosen = np.unique(np.linspace(0, len(one.data.sparsity) - 1, MAX_COLUMNS).round().astype(int))
    steps = [one.data.sparsity[at][0] for at in chosen]
    names = list(one.data.sparsity[-1][1])
    table = np.full((len(names), len(steps)), np.nan)
    for column, at in enumerate(chosen):
        for row, name in enumerate(names):
            count, size, _ = one.data.sparsity[at][1].get(name, (0, 0, 0.0))
            table[row, column] = 100 * count / size if size else np.nan
    last = table[:, -1]
    most, least = int(np.nanargmax(last)), int(np.nanargmin(last))
    sentence = f"{names[most]} ends sparsest, with {last[most]:.0f} % zeros"
    if last[most] - last[least] >= 1:
        sentence += f"; {names[least]} keeps most, with {last[least]:.0f} %"
    else:
        sentence = f"All layers end with about {last[most]:.0f} % zeros"
    trace: dict[str, Any] = {
        "type": "heatmap",
        "z": table,
        "x": [str(step) for step in steps],
        "y": [theme.safe(name) for name in names],
        "zmin": 0,
        "zmax": 100,
        "colorscale": _SCALE,
        "colorbar": {"title": {"text": "Zero (%)", "side": "right"}, "outlinewidth": 0, "thickness": 14},
        "hovertemplate": "%{y} after %{x} updates: %{z:.1f} % zero<extra></extra>",
    }
    layout = theme.layout(
        sentence,
        xaxis=theme.axis("Updates", type="category", showgrid=False, nticks=10),
        yaxis=theme.axis("", type="category", showgrid=False, ticks="", autorange="reversed"),
        height=150 + 22 * min(len(names), 40),
    )
    rows: list[Row] = [
        {
            "Layer": name,
            "Weights": f"{one.data.sparsity[-1][1][name][1]:,}",
            "Zero": f"{table[row, -1]:.1f} %",
        }
        for row, name in enumerate(names)
    ]
    return Picture([trace], layout, summary=f"{sentence}.", rows=rows)
