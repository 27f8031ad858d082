"""Staleness of gradients: the number of updates of the weights between reading them and using the gradient."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labkit.plots import theme, traced, wording
from labkit.plots.picture import Picture, Row
from labkit.plots.shown import labeled_runs

MAX_BARS = 32
"""Maximum number of bars; older gradients share the last one."""


def mean(counts: NDArray[np.int64]) -> float:
    """Return the mean of a histogram of ages, in updates."""
    return float((np.arange(len(counts)) * counts).sum() / counts.sum())


def oldest(counts: NDArray[np.int64]) -> int:
    """Return the largest age in a histogram, in updates."""
    return int(np.flatnonzero(counts)[-1])


def staleness(runs: Iterable[Any] | Any) -> Picture:
    """Plot the share of gradients by their age in updates, one set of bars per run; age 0 is synchronous training."""
    labeled = [run for run in labeled_runs(runs) if run.data.staleness.sum()]
    if not labeled:
        return traced.empty_picture(
            "No staleness to show: 0 runs have measured it (asynchronous and delayed updates do)"
        )
    names = traced.run_names(labeled)
    counts = [run.data.staleness for run in labeled]
    sentence = wording.opening(_finding(names, counts))
    last_bar = min(MAX_BARS, max(map(oldest, counts)))
    has_overflow = last_bar == MAX_BARS
    ages = [str(age) for age in range(last_bar)] + [f"{last_bar} or more" if has_overflow else str(last_bar)]
    traces = []
    for index, (name, histogram) in enumerate(zip(names, counts, strict=True)):
        binned = (
            np.concatenate([histogram[:last_bar], [histogram[last_bar:].sum()]])
            if len(histogram) > last_bar
            else histogram
        )
        shares = 100 * np.pad(binned, (0, last_bar + 1 - len(binned))) / histogram.sum()
        title = f"{name}: {theme.number(mean(histogram))} on average, at most {oldest(histogram)}"
        bar = traced.bar_trace(
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
            "Gradients": f"{int(histogram.sum()):,}",
            "Mean age (updates)": theme.number(mean(histogram)),
            "Median": int(np.searchsorted(np.cumsum(histogram), histogram.sum() / 2)),
            "Oldest": oldest(histogram),
            "Fresh (age 0)": traced.percent(histogram[0] / histogram.sum()),
        }
        for name, histogram in zip(names, counts, strict=True)
    ]
    return Picture(traces, layout, summary=f"{sentence}.", rows=rows)


def _finding(names: list[str], counts: list[NDArray[np.int64]]) -> str:
    means = [(mean(histogram), name) for name, histogram in zip(names, counts, strict=True)]
    largest, name = max(means)
    sentence = f"gradients are {theme.number(largest, 2)} updates old on average with {name}"
    if len(means) == 1:
        return f"{sentence}, at most {oldest(counts[0])}"
    smallest, fresh = min(means)
    return f"{sentence}, {theme.number(smallest, 2)} with {fresh}"
