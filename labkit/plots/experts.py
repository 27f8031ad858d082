"""How evenly tokens fall on experts: one row a mixture, one column an expert."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from labkit.plots import theme, traced
from labkit.plots.picture import Picture
from labkit.plots.shown import LabeledRun

MAX_WRITTEN = 16
"""More experts than this leave no room for numbers in the boxes."""
_SCALE = [[0.0, "#f7fbff"], [0.5, theme.PALETTE[5]], [1.0, theme.PALETTE[0]]]


def finding(shares: dict[str, np.ndarray[Any, Any]]) -> str:
    """The fullest expert, beside an even share."""
    block, load = max(shares.items(), key=lambda item: float(item[1].max()) * len(item[1]))
    expert, even = int(load.argmax()), 1 / len(load)
    return (
        f"Expert {expert} of {block} takes {traced.percent(float(load[expert]))} of the choices, "
        f"{float(load[expert]) / even:.1f} times an even share ({traced.percent(even)})"
    )


def _number(item: tuple[str, Any]) -> list[str | int]:
    """Order of the blocks in the model: layer_2 before layer_10, on whatever rank they are."""
    return [int(part) if at % 2 else part for at, part in enumerate(re.split(r"([0-9]{1,9})", item[0]))]


def experts(run: Any) -> Picture:
    """Share of all choices that fell on each expert in the traced update, over all ranks."""
    one = LabeledRun.of(run)
    loads = {name: load for name, load in sorted(one.data.experts.items(), key=_number) if load.sum()}
    if not loads:
        return traced.nothing("No experts to show: it takes workload.experts and 1 traced update")
    shares = {name: load / load.sum() for name, load in loads.items()}
    width = max(len(load) for load in shares.values())
    names, columns = list(shares), [f"expert {number}" for number in range(width)]
    table = np.full((len(shares), width), np.nan)
    for at, load in enumerate(shares.values()):
        table[at, : len(load)] = 100 * load
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
    if width <= MAX_WRITTEN:
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
            for column, value in zip(columns, table[at].tolist(), strict=True)
        }
        for at, name in enumerate(names)
    ]
    return Picture([trace], layout, summary=f"{sentence}.", rows=rows)
