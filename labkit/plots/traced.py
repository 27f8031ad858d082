"""Helpers of the figures of a traced step: names of runs, units, bars with patterns, layouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from labkit.experiment.memory import zero_stage
from labkit.plots import theme, wording
from labkit.plots.picture import Picture
from labkit.plots.shown import LabeledRun
from labkit.runs import pipeline
from labkit.runs.methods import period
from labkit.runs.pipeline import Bubble, first_pipeline
from labkit.runs.steady import SteadyState

PATTERNS = ("", "/", "x", ".", "-", "+")
"""Pattern of a bar in addition to its colour, in the order of the palette."""


def run_names(runs: Sequence[LabeledRun], links: bool = True) -> list[str]:
    """Return names that distinguish the runs of a figure: their own, or the settings that not all of them share.

    If some runs combine gradients in another way, the others are called plain averaging; if some networks are sparse
    or in low precision, the others are called dense. Without `links` the names leave out the link.
    """
    descriptions, counts = [_words(run, links) for run in runs], dict[str, int]()
    if any(_method_words(run) for run in runs):
        uses_averaging = [run.world_size > 1 and run.experiment is not None and not _method_words(run) for run in runs]
        descriptions = [
            [wording.PLAIN, *words] if plain else words
            for words, plain in zip(descriptions, uses_averaging, strict=True)
        ]
    if any(_low_precision(run) for run in runs):
        plain = [run.experiment is not None and not run.experiment.name and not _low_precision(run) for run in runs]
        descriptions = [
            [wording.DENSE, *words] if dense else words for words, dense in zip(descriptions, plain, strict=True)
        ]
    shared = set.intersection(*map(set, descriptions)) if len(descriptions) > 1 else set()
    names = []
    for words in descriptions:
        name = ", ".join(word for word in words if word not in shared) or ", ".join(words)
        count = counts[name] = counts.get(name, 0) + 1
        names.append(name if count == 1 or not links else f"{name} #{count}")
    return names


def _method_words(run: LabeledRun) -> list[str]:
    return wording.method(run.experiment) if run.experiment is not None and not run.experiment.name else []


def _low_precision(run: LabeledRun) -> list[str]:
    return wording.low_precision(run.experiment) if run.experiment is not None and not run.experiment.name else []


def _words(run: LabeledRun, links: bool) -> list[str]:
    """Return `1 rank`, `PowerSGD`, `shard4, ZeRO 2`, `pp2, 1f1b, 8 microbatches`, … in parts; or the run's own name."""
    experiment = run.experiment
    if experiment is None or experiment.name:
        return [experiment.name if experiment else run.label]
    layout = experiment.layout
    words = [
        *wording.low_precision(experiment),
        *wording.method(experiment),
        theme.ranks(1) if layout.world_size == 1 else str(layout),
    ]
    if zero_stage(experiment):
        words.append(f"ZeRO {layout.zero_stage}")
    if layout.tp > 1 and layout.sequence_parallel:
        words.append("sequence parallel")
    if layout.pp > 1:
        words.append(layout.order.name)
        if not layout.order.single_microbatch:
            words.append(f"{layout.microbatches} microbatches")
        if layout.order.asynchronous:
            words += wording.changed(layout, ("weight_stashing", "weight_prediction"))
        balance = getattr(layout, "balance", "blocks")
        if getattr(layout, "stage_blocks", None):
            words.append("cut by hand")
        elif balance != "blocks":
            words.append(f"cut by {balance}")
    checkpointing = getattr(layout, "activation_checkpointing", "none")
    if checkpointing != "none":
        words.append(f"{checkpointing} checkpointing")
    return words + (wording.link(experiment) if links else [])


def byte_unit(largest: float) -> tuple[float, str]:
    """Return the bytes per unit and its name, so that `largest` has at most four digits before the decimal point."""
    for size, name in ((2**30, "GB"), (2**20, "MB"), (2**10, "kB")):
        if largest >= size:
            return float(size), name
    return 1.0, "bytes"


def format_bytes(count: float) -> str:
    """Return a number of bytes as text: `46.1 MB`."""
    bytes_per_unit, name = byte_unit(count)
    if bytes_per_unit == 1:
        return f"{count:.0f} {name}"
    return f"{theme.number(count / bytes_per_unit)} {name}"


def percent(share: float) -> str:
    """Return a fraction as text: `27 %`."""
    return f"{100 * share:.0f} %"


def bubble_of(run: LabeledRun) -> Bubble | None:
    """Return the bubble of rank 0's pipeline; None without one or if its timeline is incomplete."""
    experiment = run.experiment
    if experiment is None or experiment.layout.pp == 1:
        return None
    timeline = first_pipeline(run.data.timeline, experiment.layout)
    try:
        return pipeline.bubble_of(timeline, experiment) if len(timeline) == experiment.layout.pp else None
    except ValueError:
        return None


def step_ms(run: LabeledRun) -> float | None:
    """Return the median step time of the slowest rank after the warm-up, in ms; None without steps."""
    period_steps = period(run.experiment)
    medians = [SteadyState.of(seconds.astype(np.float64), period_steps).median for seconds in run.data.seconds]
    finite = [median for median in medians if median is not None and np.isfinite(median)]
    return 1000 * max(finite) if finite else None


def bar_trace(index: int, name: str, values: Sequence[float | None], **properties: Any) -> dict[str, Any]:
    """Return a trace of horizontal bars in the colour and pattern at `index`."""
    colour = theme.style(index)[0]
    # All is explicit: saved figures have no template, without which plotly draws no background behind a pattern.
    pattern = {"shape": PATTERNS[index % len(PATTERNS)], "fillmode": "overlay", "solidity": 0.2, "size": 7}
    pattern |= {"bgcolor": colour, "fgcolor": "#ffffff", "fgopacity": 0.55}
    base = {"type": "bar", "name": theme.safe(name), "marker": {"color": colour, "pattern": pattern}}
    return base | {"orientation": "h", "x": list(values)} | properties


def outside_text(texts: Sequence[str]) -> dict[str, Any]:
    """Return text at the ends of bars, where no pattern is behind it. The axis needs `axis_range`."""
    return {"text": list(texts), "textposition": "outside", "cliponaxis": False, "textfont": {"color": theme.INK}}


def axis_range(values: Sequence[float | None]) -> list[float]:
    """Return a range from zero to a third beyond the largest value."""
    return [0.0, 1.33 * max((value for value in values if value), default=1.0)]


def layout(title: str, **more: Any) -> dict[str, Any]:
    """Return a layout with room for a title of two lines and a legend below it."""
    base = theme.layout(title, margin=theme.LAYOUT["margin"] | {"t": 124}, **more)
    place = {"yref": "container", "y": 1, "yanchor": "top", "pad": {"t": 38}}  # below plotly's buttons
    legend = theme.LAYOUT["legend"] | {"traceorder": "normal"} | more.get("legend", {})
    return base | {"title": base["title"] | place, "legend": legend}


def button_row(buttons: Sequence[dict[str, Any]], active: int = 0) -> dict[str, Any]:
    """Return a row of buttons above the panels (plotly's `updatemenus`, which work without a kernel)."""
    position = {"x": 0, "xanchor": "left", "y": 1.03, "yanchor": "bottom", "pad": {"t": 0, "b": 4}}
    style = {"bgcolor": theme.PAPER, "bordercolor": "#9aa5b1", "font": {"size": 12, "color": theme.INK}}
    return {"type": "buttons", "direction": "right", "active": active, "buttons": list(buttons)} | position | style


def heading(text: str, x: float, y: float) -> dict[str, Any]:
    """Return the title of a panel at its upper left corner (paper coordinates)."""
    return {
        "text": f"<b>{theme.wrapped(text, 90)}</b>",
        "x": x,
        "y": y,
        "xref": "paper",
        "yref": "paper",
        "xanchor": "left",
        "yanchor": "bottom",
        "align": "left",
        "showarrow": False,
        "font": {"size": 13.5, "color": theme.INK},
    }


def empty_picture(reason: str) -> Picture:
    """Return an empty figure that says why there is nothing to show."""
    layout = theme.layout(reason, height=120, xaxis={"visible": False}, yaxis={"visible": False})
    return Picture([], layout, summary=f"{reason}.", rows=[])
