"""Expert load: how evenly tokens are routed; one row per mixture, one column per expert."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from labkit.plots import theme, traced
from labkit.plots.picture import Picture
from labkit.plots.shown import LabeledRun

MAX_COLUMNS_WITH_TEXT = 16
"""With more experts than this the boxes have no room for numbers."""
_SCALE = [[0.0, "#f7fbff"], [0.5, theme.PALETTE[5]], [1.0, theme.PALETTE[0]]]


def finding(shares: dict[str, np.ndarray[Any, Any]]) -> str:
    """Return the headline: the expert with the highest load, compared with an even share."""
    block, load = max(shares.items(), key=lambda item: float(item[1].max()) * len(item[1]))
    expert, even = int(load.argmax()), 1 / len(load)
    return (
        f"Expert {expert} of {block} takes {traced.percent(float(load[expert]))} of the choices, "
        f"{float(load[expert]) / even:.1f} times an even share ({traced.percent(even)})"
    )


def _natural_order(item: tuple[str, Any]) -> list[str | int]:
    """Return a sort key that puts layer_2 before layer_10."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"([0-9]{1,9})", item[0]))]


def experts(run: Any) -> Picture:
    """Plot the fraction of all choices that each expert got in the traced step, over all ranks."""
    labeled_run = LabeledRun.of(run)
    loads = {name: load for name, load in sorted(labeled_run.data.experts.items(), key=_natural_order) if load.sum()}
    if not loads:
        return traced.empty_picture("No experts to show: it takes workload.experts and 1 traced step")
    shares = {name: load / load.sum() for name, load in loads.items()}
    width = max(len(load) for load in shares.values())
    names, columns = list(shares), [f"expert {number}" for number in range(width)]
    table = np.full((len(shares), width), np.nan)
    for index, load in enumerate(shares.values()):
        table[index, : len(load)] = 100 * load
    sentence = finding(shares)
    trace: dict[str, Any] = {
        "type": "heatmap",
        "z": table,
        "x": columns,
        "y": [theme.safe(name) for name in names],
        "zmin": 0,
        "zmax": float(np.nanmax(table)),
        "colorscale": _SCALE,
        "xgap": 3,
        "ygap": 3,
        "colorbar": {"title": {"text": "Choices (%)", "side": "right"}, "outlinewidth": 0, "thickness": 14},
        "hovertemplate": "%{y}, %{x}: %{z:.1f} % of the choices<extra></extra>",
    }
    if width <= MAX_COLUMNS_WITH_TEXT:
        trace |= {"texttemplate": "%{z:.0f} %", "textfont": {"size": 13}}
    layout = theme.layout(
        sentence,
        xaxis=theme.axis("", type="category", showgrid=False, ticks="", side="bottom"),
        yaxis=theme.axis("", type="category", showgrid=False, ticks="", autorange="reversed"),
        height=150 + 44 * min(len(names), 24),
    )
    rows = [
        {"Block": name}
        | {
            column: "–" if np.isnan(value) else f"{value:.1f} %"
            for column, value in zip(columns, table[index].tolist(), strict=True)
        }
        for index, name in enumerate(names)
    ]
    return Picture([trace], layout, summary=f"{sentence}.", rows=rows)
