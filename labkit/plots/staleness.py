"""How old gradients were when they were used: how many updates the weights had seen since they were read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labkit.plots import theme, traced, wording
from labkit.plots.picture import Picture, Row
from labkit.plots.shown import shown

MAX_BARS = 32
"""Older ones share the last bar."""


def mean(counts: NDArray[np.int64]) -> float:
    """Of the ages that were counted, in updates."""
    return float((np.arange(len(counts)) * counts).sum() / counts.sum())


def oldest(counts: NDArray[np.int64]) -> int:
    """The largest age that was seen."""
    return int(np.flatnonzero(counts)[-1])


def staleness(runs: Iterable[Any] | Any) -> Picture:
    """Share of gradients by their age in updates, one set of bars a run. 0 is what synchronous training uses."""
    many = [one for one in shown(runs) if one.data.staleness.sum()]
    if not many:
        return traced.nothing("No staleness to show: 0 runs have measured it (asynchronous and delayed updates do)")
    names = traced.names(many)
    counts = [one.data.staleness for one in many]
    sentence = wording.opening(_finding(names, counts))
    last = min(MAX_BARS, max(map(oldest, counts)))
    cut = last == MAX_BARS
    ages = [str(age) for age in range(last)] + [f"{last} or more" if cut else str(last)]
    traces = []
    for index, (name, seen) in enumerate(zip(names, counts, strict=True)):
        whole = np.concatenate([seen[:last], [seen[last:].sum()]]) if len(seen) > last else seen
        shares = 100 * np.pad(whole, (0, last + 1 - len(whole))) / seen.sum()
        title = f"{name}: {theme.number(mean(seen))} on average, at most {oldest(seen)}"
        bar = traced.bars(
            index, title, [], hovertemplate="%{x} updates old: %{y:.3~g} %<extra>" + theme.safe(name) + "</extra>"
        )
        traces.append(bar | {"orientation": "v", "x": ages, "y": shares.tolist(), "showlegend": True})
    layout = traced.layout(
        sentence,
        barmode="group",
        bargap=0.25,
        xaxis=theme.axis("Age of a gradient when it was used (updates)", type="category", ticks=""),
        yaxis=theme.axis("Share of gradients (%)", rangemode="tozero"),
        height=400,
    )
    rows: list[Row] = [
        {
            "Run": name,
            "Gradients": f"{int(seen.sum()):,}",
            "Mean age (updates)": theme.number(mean(seen)),
            "Median": int(np.searchsorted(np.cumsum(seen), seen.sum() / 2)),
            "Oldest": oldest(seen),
            "Fresh (age 0)": traced.percent(seen[0] / seen.sum()),
        }
        for name, seen in zip(names, counts, strict=True)
    ]
    return Picture(traces, layout, summary=f"{sentence}.", rows=rows)


def _finding(names: list[str], counts: list[NDArray[np.int64]]) -> str:
    means = [(mean(seen), name) for name, seen in zip(names, counts, strict=True)]
    most, name = max(means)
    said = f"gradients are {theme.number(most, 2)} updates old on average with {name}"
    if len(means) == 1:
        return f"{said}, at most {oldest(counts[0])}"
    least, fresh = min(means)
    return f"{said}, {theme.number(least, 2)} with {fresh}"
