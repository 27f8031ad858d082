"""The picture of the lab: loss, held-out metric, throughput and speed-up of a few runs in one figure.

The live dashboard and the record draw this same figure. The traces stand at fixed places (`SLOTS` runs, then the
speed-up), so that a live redraw only replaces arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from labkit.plots import curves, speedup, theme
from labkit.plots.against import TITLES, checked
from labkit.plots.picture import Picture
from labkit.plots.shown import LabeledRun, shown
from labkit.plots.table import runs_rows
from labkit.runs.methods import period

SLOTS = 4
AGAINST = ("steps", "time", "bytes")
"""What its curves can be drawn against."""
AXES = ("xaxis", "yaxis", "xaxis2", "yaxis2", "xaxis3", "yaxis3", "xaxis4", "yaxis4")
HEIGHT = 640
_NOTHING = (np.zeros(0), np.zeros(0))
_LEFT, _RIGHT, _UPPER, _LOWER = [0.0, 0.455], [0.545, 1.0], [0.60, 0.955], [0.06, 0.415]
_CHARACTERS = 50
"""So many characters of a panel's title fit on a line."""

Rows = Sequence[Mapping[str, Any]]


def findings(runs: Sequence[LabeledRun], rows: Rows) -> list[str]:
    """One sentence (without its full stop) for each of the four panels."""
    return [
        curves.loss_finding(runs),
        curves.metric_finding(runs),
        curves.throughput_finding(runs),
        speedup.finding(rows),
    ]


def traces(runs: Sequence[LabeledRun], rows: Rows, against: str = "steps") -> list[dict[str, Any]]:
    """4 × SLOTS lines, then the three traces of the speed-up; a free slot holds empty lines."""
    found: list[dict[str, Any]] = []
    for slot in range(SLOTS):
        one = runs[slot] if slot < len(runs) else None
        if one is None:
            found += [
                *_no_loss(slot, against),
                *(curves.line(slot, "", _NOTHING, "", against, showlegend=False, **_at(at)) for at in (2, 3)),
            ]
            continue
        losses = _no_loss(slot, against) if one.is_ceiling else curves.loss_traces(slot, one, against, **_at(1))
        found += losses
        held_out = _NOTHING if one.is_ceiling else curves.metric_line(one.data, against)
        found.append(curves.line(slot, one.label, held_out, "", against, **_at(2), showlegend=False))
        rate = curves.throughput_line(one.data, against)
        found.append(curves.line(slot, one.label, rate, " samples/s", against, **_at(3), showlegend=one.is_ceiling))
    return found + speedup.traces(rows, **_at(4))


def _no_loss(slot: int, against: str) -> list[dict[str, Any]]:
    """The two traces of a loss, empty."""
    return [
        curves.faint(slot, "", _NOTHING, **_at(1)),
        curves.line(slot, "", _NOTHING, "", against, showlegend=False, **_at(1)),
    ]


def _at(panel: int) -> dict[str, str]:
    return {"xaxis": "x" if panel == 1 else f"x{panel}", "yaxis": "y" if panel == 1 else f"y{panel}"}


def titles(sentences: Sequence[str]) -> list[dict[str, Any]]:
    """The four sentences as the titles of their panels."""
    places = [(_LEFT, _UPPER), (_RIGHT, _UPPER), (_LEFT, _LOWER), (_RIGHT, _LOWER)]
    return [
        {
            "text": f"<b>{theme.wrapped(sentence, _CHARACTERS)}</b>",
            "x": across[0],
            "y": up[1] + 0.012,
            "xref": "paper",
            "yref": "paper",
            "xanchor": "left",
            "yanchor": "bottom",
            "showarrow": False,
            "align": "left",
            "font": {"size": 13.5, "color": theme.INK},
        }
        for sentence, (across, up) in zip(sentences, places, strict=True)
    ]


def layout(runs: Sequence[LabeledRun], rows: Rows, height: int = HEIGHT, against: str = "steps") -> dict[str, Any]:
    """Axes, titles and legends of the four panels."""
    base = {key: value for key, value in theme.LAYOUT.items() if key != "title"}
    step = TITLES[against]
    from_zero = {"autorangeoptions": {"clipmin": 0}}
    found = base | {
        "height": height,
        "xaxis": theme.axis(step, domain=_LEFT, anchor="y", **from_zero),
        "yaxis": theme.axis("Training loss", domain=_UPPER, anchor="x", **from_zero),
        "xaxis2": theme.axis(step, domain=_RIGHT, anchor="y2", matches="x", **from_zero),
        "yaxis2": theme.axis(theme.safe(curves.metric_title(runs)), domain=_UPPER, anchor="x2"),
        "xaxis3": theme.axis(step, domain=_LEFT, anchor="y3", matches="x", **from_zero),
        "yaxis3": theme.axis("Throughput (samples/s)", domain=_LOWER, anchor="x3", rangemode="tozero"),
        "xaxis4": theme.axis("", domain=_RIGHT, anchor="y4", type="category"),
        "yaxis4": theme.axis("Speed-up (× 1 rank)", domain=_LOWER, anchor="x4", rangemode="tozero"),
        "annotations": titles(findings(runs, rows)),
        "legend": base["legend"] | {"y": 1.06, "traceorder": "normal"},
        "legend2": base["legend"] | {"x": 1, "xanchor": "right", "y": _LOWER[0] - 0.075, "yanchor": "top"},
        "showlegend": True,
        "margin": {"l": 60, "r": 16, "t": 56, "b": 48},
        "autosize": True,
    }
    for name in AXES:  # numbers along an empty axis would mean nothing
        found[name]["showticklabels"] = bool(speedup.bars(rows) if name.endswith("4") else runs)
    return found


def overview(runs: Iterable[Any] | Any, comparison: Any = (), height: int = HEIGHT, against: str = "steps") -> Picture:
    """Loss, held-out metric, throughput and speed-up of the last `SLOTS` of `runs` in one figure.

    `comparison` is what `labkit.runs.compare.compare` returns, or its rows; without it the speed-up stays empty.
    `against` is what the curves are drawn against: steps, time or bytes.
    """
    checked(against, *AGAINST)
    many = shown(runs)[-SLOTS:]
    rows = list(getattr(comparison, "rows", comparison))
    sentences = findings(many, rows)
    summary = ". ".join(sentences) + "."
    return Picture(
        traces(many, rows, against), layout(many, rows, height, against), summary=summary, rows=twin(many, rows)
    )


def twin(runs: Sequence[LabeledRun], rows: Rows) -> list[dict[str, Any]]:
    """The runs table, or without a comparison a table of the ends of the curves."""
    if rows:
        return runs_rows(rows)
    found = []
    for one in runs:
        loss, (_, held_out) = one.data.loss, curves.metric_line(one.data)
        found.append(
            {
                "Run": one.label,
                "State": theme.plain(one.data.state),
                "Steps": one.data.steps,
                "Last loss": theme.figure(float(loss[-1]) if len(loss) else None),
                curves.metric_title([one]): theme.figure(float(held_out[-1]) if len(held_out) else None),
                "Samples/s": theme.number(curves.throughput(one.data, period(one.experiment))),
            }
        )
    return found
