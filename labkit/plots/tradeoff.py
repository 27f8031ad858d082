"""What a method costs and what it saves: the loss against samples, against time and against bytes, on one picture.

Against samples one sees what a method does to learning; against time, what it is worth here; against bytes, what it
would be worth on a slow network.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from labkit.plots import curves, theme, traced, wording
from labkit.plots.against import HOVER, MB, TITLES, along, checked
from labkit.plots.downsample import Floats, extremes
from labkit.plots.picture import Picture, Row
from labkit.plots.shown import LabeledRun, shown
from labkit.runs import target as targets
from labkit.runs.target import Reached

VIEWS = ("samples", "time", "bytes")
_BUTTONS = {"samples": "against samples", "time": "against time", "bytes": "against bytes"}
_PANELS = ([0.0, 0.46], [0.555, 1.0])
POINTS = 200
"""Most points of a line: each is drawn three times, and an executed notebook keeps them all."""
STEEP = 10
"""A loss that falls by more than this factor, and times that differ by more, get a logarithmic axis."""


@dataclass(frozen=True)
class _Line:
    """One run and what the picture says of it."""

    name: str
    index: int
    """Its place in the palette; that with which the others are compared has none and is drawn in black."""
    shown: LabeledRun
    loss: Floats
    """Running mean at each step."""
    final: float | None
    reached: Reached | None

    @property
    def plain(self) -> bool:
        """Is it what the others are compared with?"""
        return self.index < 0


def tradeoff(runs: Iterable[Any] | Any, against: str = "time", target: float | None = None) -> Picture:
    """Training loss and held-out metric of several runs, with a switch: against samples, time or bytes.

    `against` is what is shown first. `target` is the loss that runs are to reach; None takes 1.02 times what the first
    plain synchronous run ends at (labkit.runs.target tells what counts). Runs without a step are left out.
    """
    checked(against, *VIEWS)
    many = [one for one in shown(runs) if one.data.steps and not one.is_ceiling]
    if not many:
        return traced.nothing("No trade-off to show: 0 runs have made a step")
    lines, aim, over = _lines(many, target)
    sentences = {view: _finding(lines, aim, view) for view in VIEWS}
    traces = [trace for view in VIEWS for trace in _traces(lines, aim, view, view == against)]
    summary = f"{sentences[against]}{_aim(lines, aim, over, target is None)}."
    layout = _layout(lines, aim, over, sentences, against)
    return Picture(traces, layout, summary=summary, rows=[_row(line, aim) for line in lines])


def _lines(many: Sequence[LabeledRun], wanted: float | None) -> tuple[list[_Line], float | None, int]:
    """The runs, the loss that they are to reach, and over how many steps a loss is averaged."""
    at = targets.reference([(one.experiment, one.data) for one in many])
    base = None if at is None else many[at]
    over = targets.window((base or many[0]).data.steps)
    aim = wanted if wanted is not None or base is None else targets.default_target(base.data, over)
    places = iter(range(len(many)))
    lines = [
        _Line(
            name,
            -1 if one is base else next(places),
            one,
            targets.running_loss(one.data, over),
            targets.final_loss(one.data, over),
            None if aim is None else targets.reached(one.data, aim, over),
        )
        for name, one in zip(traced.names(many), many, strict=True)
    ]
    return lines, aim, over


def _aim(lines: Sequence[_Line], aim: float | None, over: int, default: bool) -> str:
    """What the target is, in words."""
    if aim is None:
        return ""
    ends = next((line.name for line in lines if line.plain), "")
    why = f", {targets.DEFAULT_MARGIN:g} times what {ends} ends at" if default else ""
    return f"; target loss {theme.number(aim)}{why} (mean of {over} steps)"


# -- findings -------------------------------------------------------------------------------------------------------


def _finding(lines: Sequence[_Line], aim: float | None, view: str) -> str:
    if view == "samples":
        return wording.opening(_gap(lines))
    return wording.opening(_race(lines, aim, view))


def _gap(lines: Sequence[_Line]) -> str:
    """How far apart the losses are when every run has seen as many samples as the one that has seen fewest."""
    least = min(int(line.shown.data.samples.sum()) for line in lines)
    losses = {line.name: _at_samples(line, least) for line in lines}
    base = next((line.name for line in lines if line.plain), lines[0].name)
    known = {name: loss for name, loss in losses.items() if np.isfinite(loss)}
    if base not in known or len(known) < 2:
        return f"{base}: loss {theme.number(losses[base])} after {least:,} samples"
    gaps = {name: loss / known[base] - 1 for name, loss in known.items() if name != base}
    low, high = min(gaps, key=lambda name: gaps[name]), max(gaps, key=lambda name: gaps[name])
    after = f"after {least:,} samples"
    if len(gaps) == 1:
        return f"{after} the loss of {low} is {_percent(gaps[low])} that of {base} ({theme.number(known[base])})"
    return (
        f"{after} losses differ from {base}'s by {100 * gaps[low]:+.1f} % ({low}) to {100 * gaps[high]:+.1f} % ({high})"
    )


def _at_samples(line: _Line, samples: int) -> float:
    """The running mean at the step by which so many samples have been seen."""
    index = int(np.searchsorted(np.cumsum(line.shown.data.samples), samples))
    return float(line.loss[min(index, len(line.loss) - 1)])


def _percent(gap: float) -> str:
    """`1.3 % above`."""
    if abs(gap) < 0.0005:
        return "equal to"
    return f"{theme.number(100 * abs(gap), 2)} % {'above' if gap > 0 else 'below'}"


def _race(lines: Sequence[_Line], aim: float | None, view: str) -> str:
    """Who gets to the target with least, and what plain averaging needs for it."""
    if aim is None:
        return "0 of these runs are plain and synchronous: there is no loss to reach"
    loss = f"a loss of {theme.number(aim)}"
    needs = {line.name: need for line in lines if (need := _needed(line, view)) is not None}
    if not needs:
        counted = view != "bytes" or any(line.reached for line in lines)
        return (
            f"No run stays at or below {loss}" if counted or view == "time" else "No bytes were counted: 0 to compare"
        )
    best = min(needs, key=lambda name: needs[name])
    base = next((line.name for line in lines if line.plain), None)
    said = f"{best} reaches {loss} {_spent(needs[best], view)}"
    if base is not None and base != best and base in needs:
        return f"{said}, {base} {_spent(needs[base], view)}"
    others = {name: need for name, need in needs.items() if name != best}
    if others:
        second = min(others, key=lambda name: others[name])
        return f"{said}, {second} {_spent(needs[second], view)}"
    return said if len(lines) == 1 else f"{said}; no other run does"


def _needed(line: _Line, view: str) -> float | None:
    if line.reached is None:
        return None
    found = {"samples": line.reached.samples, "time": line.reached.seconds, "bytes": line.reached.bytes}[view]
    return None if found is None else float(found)


def _spent(need: float, view: str) -> str:
    return f"in {seconds(need)}" if view == "time" else f"with {traced.size(need)} sent"


def seconds(value: float) -> str:
    """`9.1 s`, `71 s`, `12 min`."""
    return f"{value / 60:.0f} min" if value >= 600 else f"{theme.number(value, 2)} s"


# -- the figure -------------------------------------------------------------------------------------------------------


def _traces(lines: Sequence[_Line], aim: float | None, view: str, visible: bool) -> list[dict[str, Any]]:
    """Per run the loss, the moment at which it reached the target, and the metric: always three."""
    found: list[dict[str, Any]] = []
    for index, line in enumerate(lines):
        data, look, moment = line.shown.data, _look(line), _needed(line, view)
        hit = [] if moment is None else [moment / MB if view == "bytes" else moment]
        common: dict[str, Any] = {"visible": visible, "legendgroup": str(index)}
        loss = _drawn(along(data, view), line.loss)
        judged = _drawn(*curves.metric_line(data, view))
        found += [
            curves.line(index, line.name, loss, "", view, **common) | look | {"mode": "lines"},
            curves.line(index, line.name, (np.array(hit), np.full(len(hit), aim)), "", view, **common)
            | {
                "mode": "markers",
                "showlegend": False,
                "marker": look["marker"] | {"symbol": "star", "size": 15, "line": {"color": theme.PAPER, "width": 1}},
                "hovertemplate": f"target reached: {HOVER[view]}<extra>%{{fullData.name}}</extra>",
            },
            curves.line(index, line.name, judged, "", view, **common)
            | look
            | {"xaxis": "x2", "yaxis": "y2", "showlegend": False},
        ]
    return found


def _look(line: _Line) -> dict[str, Any]:
    """Line and marker: black and broad for what the others are compared with."""
    colour, dash, marker = (theme.INK, "solid", "circle") if line.plain else theme.style(line.index)
    return {
        "line": {"color": colour, "dash": dash, "width": 3.5 if line.plain else 2.2},
        "marker": {"symbol": marker, "size": 7, "color": colour},
    }


def _drawn(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """At most POINTS points, as float32; before anything was sent there is no place on a logarithmic axis."""
    at, value = extremes(x, y, POINTS)
    known = np.isfinite(at)
    return at[known].astype(np.float32), value[known].astype(np.float32)


def _layout(
    lines: Sequence[_Line], aim: float | None, over: int, sentences: dict[str, str], against: str
) -> dict[str, Any]:
    scales = {view: _scale(lines, view) for view in VIEWS}
    title = curves.metric_title([line.shown for line in lines])
    found = traced.layout(
        sentences[against],
        xaxis=theme.axis(TITLES[against], domain=_PANELS[0], anchor="y", **scales[against]),
        yaxis=theme.axis(f"Training loss (mean of {over} steps)", anchor="x", **_height(lines)),
        xaxis2=theme.axis(TITLES[against], domain=_PANELS[1], anchor="y2", matches="x", **scales[against]),
        yaxis2=theme.axis(theme.safe(title), anchor="x2"),
        legend={"y": -0.2, "yanchor": "top"},
        height=500,
        updatemenus=[_switch(len(lines), sentences, scales, against)],
    )
    if aim is not None:
        found["shapes"] = [
            {
                "type": "line",
                "xref": "x domain",
                "x0": 0,
                "x1": 1,
                "y0": aim,
                "y1": aim,
                "line": {"color": theme.INK, "width": 1.2, "dash": "dot"},
                "label": {
                    "text": f"target {theme.number(aim)}",
                    "textposition": "start",
                    "yanchor": "bottom",
                    "font": {"size": 12, "color": theme.INK},
                },
            }
        ]
    return found


def _height(lines: Sequence[_Line]) -> dict[str, Any]:
    """The scale of the loss: logarithmic where it falls steeply, so that its end can be seen."""
    known = np.concatenate([line.loss[np.isfinite(line.loss)] for line in lines])
    if not len(known) or known.min() <= 0 or known.max() / known.min() < STEEP:
        return {}
    return theme.decades(known.min() / 1.15, known.max() * 1.1)


def _scale(lines: Sequence[_Line], view: str) -> dict[str, Any]:
    """Of the horizontal axis: logarithmic for bytes, and for times that lie far apart."""
    ends = [float(np.nanmax(every)) for line in lines if np.isfinite(every := along(line.shown.data, view)).any()]
    ends = [end for end in ends if end > 0]
    if ends and (view == "bytes" or (view == "time" and max(ends) / min(ends) > STEEP)):
        return theme.decades(min(ends) / 30, max(ends) * 1.15)
    return {"type": "linear", "autorange": True, "tickmode": "auto", "rangemode": "tozero"}


def _switch(runs: int, sentences: dict[str, str], scales: dict[str, dict[str, Any]], against: str) -> dict[str, Any]:
    """Three buttons above the panels: each shows its own lines, axes and finding."""
    buttons = []
    for view in VIEWS:
        changes: dict[str, Any] = {"title.text": theme.layout(sentences[view])["title"]["text"]}
        for name in ("xaxis", "xaxis2"):
            changes |= {f"{name}.{key}": value for key, value in scales[view].items()}
            changes[f"{name}.title.text"] = TITLES[view]
        visible = [view == other for other in VIEWS for _ in range(3 * runs)]
        buttons.append({"label": _BUTTONS[view], "method": "update", "args": [{"visible": visible}, changes]})
    return traced.switch(buttons, VIEWS.index(against))


def _row(line: _Line, aim: float | None) -> Row:
    data, hit = line.shown.data, line.reached
    sent = data.sent
    held_out = curves.metric_line(data)[1]
    row: Row = {
        "Run": line.name,
        "Final loss": theme.figure(math.nan if line.final is None and data.steps else line.final),
        curves.metric_title([line.shown]): theme.figure(float(held_out[-1]) if len(held_out) else None),
        "Samples": f"{int(data.samples.sum()):,}",
        "Time (s)": theme.number(float(data.training_seconds[-1])),
        "Sent": "–" if np.isnan(sent).all() else traced.size(float(np.nansum(sent))),
    }
    if aim is not None:
        to = f"To a loss of {theme.number(aim)}"
        row |= {
            f"{to}: samples": f"{hit.samples:,}" if hit else "–",
            "time (s)": theme.number(hit.seconds if hit else None),
            "sent": traced.size(hit.bytes) if hit and hit.bytes is not None else "–",
        }
    return row
