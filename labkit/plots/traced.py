"""What the pictures of a traced update share: names of runs, units, patterns beside colours."""

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
"""Beside the colour of a bar, in the order of the palette."""


def names(runs: Sequence[LabeledRun], links: bool = True) -> list[str]:
    """What tells the runs of a picture apart: their names, or in words what not all of them share.

    Where some ranks combined gradients in another way, the others are said to average them; where some networks are
    sparse or narrow, the others are said to be dense. Without `links` the names
    of a method do not tell over what link it went.
    """
    every, seen = [_words(one, links) for one in runs], dict[str, int]()
    if any(_method(one) for one in runs):
        averages = [one.world_size > 1 and one.experiment is not None and not _method(one) for one in runs]
        every = [[wording.PLAIN, *words] if plain else words for words, plain in zip(every, averages, strict=True)]
    if any(_narrowed(one) for one in runs):
        plain = [one.experiment is not None and not one.experiment.name and not _narrowed(one) for one in runs]
        every = [[wording.DENSE, *words] if dense else words for words, dense in zip(every, plain, strict=True)]
    shared = set.intersection(*map(set, every)) if len(every) > 1 else set()
    found = []
    for words in every:
        name = ", ".join(word for word in words if word not in shared) or ", ".join(words)
        count = seen[name] = seen.get(name, 0) + 1
        found.append(name if count == 1 or not links else f"{name} #{count}")
    return found


def _method(one: LabeledRun) -> list[str]:
    return wording.method(one.experiment) if one.experiment is not None and not one.experiment.name else []


def _narrowed(one: LabeledRun) -> list[str]:
    return wording.narrowed(one.experiment) if one.experiment is not None and not one.experiment.name else []


def _words(one: LabeledRun, links: bool) -> list[str]:
    """`1 rank`, `PowerSGD`, `shard4, ZeRO 2`, `pp2, 1f1b, 8 microbatches`, …; or the name that the run was given."""
    experiment = one.experiment
    if experiment is None or experiment.name:
        return [experiment.name if experiment else one.label]
    layout = experiment.layout
    words = [
        *wording.narrowed(experiment),
        *wording.method(experiment),
        theme.ranks(1) if layout.world_size == 1 else str(layout),
    ]
    if zero_stage(experiment):
        words.append(f"ZeRO {layout.zero_stage}")
    if layout.tp > 1 and layout.sequence_parallel:
        words.append("sequence parallel")
    if layout.pp > 1:
        words.append(pipeline.schedule_name(experiment))
        if words[-1] == layout.schedule != "naive":
            words.append(f"{layout.microbatches} microbatches")
        balance = getattr(layout, "balance", "blocks")
        if getattr(layout, "stage_blocks", None):
            words.append("cut by hand")
        elif balance != "blocks":
            words.append(f"cut by {balance}")
    again = getattr(layout, "activation_checkpointing", "none")
    if again != "none":
        words.append(f"{again} checkpointing")
    return words + (wording.link(experiment) if links else [])


def unit(largest: float) -> tuple[float, str]:
    """Bytes per unit and the unit's name, so that the largest value has at most four digits before the point."""
    for size, name in ((2**30, "GB"), (2**20, "MB"), (2**10, "kB")):
        if largest >= size:
            return float(size), name
    return 1.0, "bytes"


def size(count: float) -> str:
    """`46.1 MB`."""
    per, name = unit(count)
    if per == 1:
        return f"{count:.0f} {name}"
    return f"{theme.number(count / per)} {name}"


def percent(share: float) -> str:
    """`27 %`."""
    return f"{100 * share:.0f} %"


def bubble_of(one: LabeledRun) -> Bubble | None:
    """That of the pipeline that rank 0 is in; None without one, or where its timeline is not whole."""
    experiment = one.experiment
    if experiment is None or experiment.layout.pp == 1:
        return None
    timeline = first_pipeline(one.data.timeline, experiment.layout)
    try:
        return pipeline.bubble_of(timeline, experiment) if len(timeline) == experiment.layout.pp else None
    except ValueError:
        return None


def step_ms(one: LabeledRun) -> float | None:
    """Median step of the slowest rank after the warm-up, in ms."""
    every = period(one.experiment)
    medians = [SteadyState.of(seconds.astype(np.float64), every).median for seconds in one.data.seconds]
    known = [median for median in medians if median is not None and np.isfinite(median)]
    return 1000 * max(known) if known else None


def bars(index: int, name: str, values: Sequence[float | None], **more: Any) -> dict[str, Any]:
    """A trace of bars in the colour and pattern at `index`."""
    colour = theme.style(index)[0]
    # All said here: without its template, which records leave out, plotly puts nothing behind a pattern.
    pattern = {"shape": PATTERNS[index % len(PATTERNS)], "fillmode": "overlay", "solidity": 0.2, "size": 7}
    pattern |= {"bgcolor": colour, "fgcolor": "#ffffff", "fgopacity": 0.55}
    base = {"type": "bar", "name": theme.safe(name), "marker": {"color": colour, "pattern": pattern}}
    return base | {"orientation": "h", "x": list(values)} | more


def outside(texts: Sequence[str]) -> dict[str, Any]:
    """Words at the ends of bars, where no pattern is behind them. The axis needs `room`."""
    return {"text": list(texts), "textposition": "outside", "cliponaxis": False, "textfont": {"color": theme.INK}}


def room(values: Sequence[float | None]) -> list[float]:
    """From zero to a third beyond the largest value."""
    return [0.0, 1.33 * max((value for value in values if value), default=1.0)]


def layout(title: str, **more: Any) -> dict[str, Any]:
    """A layout with room for a title of two lines and a legend below it."""
    base = theme.layout(title, margin=theme.LAYOUT["margin"] | {"t": 124}, **more)
    place = {"yref": "container", "y": 1, "yanchor": "top", "pad": {"t": 38}}  # below plotly's buttons
    legend = theme.LAYOUT["legend"] | {"traceorder": "normal"} | more.get("legend", {})
    return base | {"title": base["title"] | place, "legend": legend}


def switch(buttons: Sequence[dict[str, Any]], active: int = 0) -> dict[str, Any]:
    """Buttons in a row above the panels, at their left (plotly's `updatemenus`: they work without a kernel)."""
    place = {"x": 0, "xanchor": "left", "y": 1.03, "yanchor": "bottom", "pad": {"t": 0, "b": 4}}
    look = {"bgcolor": theme.PAPER, "bordercolor": "#9aa5b1", "font": {"size": 12, "color": theme.INK}}
    return {"type": "buttons", "direction": "right", "active": active, "buttons": list(buttons)} | place | look


def heading(text: str, x: float, y: float) -> dict[str, Any]:
    """The title of a panel, at its upper left corner (paper coordinates)."""
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


def nothing(why: str) -> Picture:
    """The picture of what was not traced, which says why."""
    layout = theme.layout(why, height=120, xaxis={"visible": False}, yaxis={"visible": False})
    return Picture([], layout, summary=f"{why}.", rows=[])
