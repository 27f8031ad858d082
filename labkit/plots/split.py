"""Where the time of a step goes, run by run: data, computing, compressing, standing still, the optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from labkit.plots import theme, traced, wording
from labkit.plots.picture import Picture, Row
from labkit.plots.shown import shown
from labkit.runs.split import MEASURED, PARTS, Split
from labkit.runs.split import split as split_of

TITLES = {
    "data": "Data",
    "compute": "Compute (forward, backward)",
    "compression": "Compression",
    "exposed": "Exposed communication",
    "optimizer": "Optimizer",
}
_MS, _PERCENT = "A step of one rank (ms, median)", "Part of a step of one rank (%, medians)"
_COLOURS = {"compute": 0, "exposed": 1, "optimizer": 2, "compression": 3, "data": 4}
"""Places in the palette: communication in the colour that warns."""


def finding(names: Sequence[str], splits: Sequence[Split]) -> str:
    """Who stands still most, and who least."""
    shares = [
        (one.exposed / one.total, name) for name, one in zip(names, splits, strict=True) if one.exposed and one.total
    ]
    if not shares:
        return f"{names[0]}: {theme.number(1000 * splits[0].total)} ms a step"
    most, slowest = max(shares)
    said = f"communication stops {slowest} for {traced.percent(most)} of a step"
    calm = {name: one for name, one in zip(names, splits, strict=True) if one.exposed is not None and name != slowest}
    if not calm:
        return said
    name = min(calm, key=lambda name: (calm[name].exposed or 0.0) / (calm[name].total or 1.0))
    one = calm[name]
    share = traced.percent((one.exposed or 0.0) / one.total) if one.total else "0 %"
    return f"{said}, {name} for {share}"


def split(runs: Iterable[Any] | Any) -> Picture:
    """Stacked bars, one a run: medians of a rank after the warm-up, in ms or as shares.

    Where ranks draw their work it is one piece of it, the mean over the ranks. The table holds the bytes that a rank
    sent in a step, counted and by the formula of its method.
    """
    pairs = [(one, found) for one in shown(runs) if (found := split_of(one.data, one.experiment)) is not None]
    if not pairs:
        return traced.nothing("No step to split: 0 runs have a step after the warm-up")
    many, splits = [one for one, _ in pairs], [found for _, found in pairs]
    names = traced.names(many)
    labels = [theme.safe(name) for name in names]
    sentence = wording.opening(finding(names, splits))
    sent = [f"{_bytes(one.bytes)} sent per rank (formula {_bytes(one.formula_bytes)})" for one in splits]
    traces = [
        traced.bars(
            _COLOURS[part],
            TITLES[part],
            [1000 * (getattr(one, part) or 0.0) for one in splits],
            y=labels,
            customdata=sent,
            hovertemplate=f"%{{y}}: %{{x:.3~g}} ms<br>%{{customdata}}<extra>{TITLES[part]}</extra>",
        )
        for part in PARTS
    ]
    totals = [1000 * one.total for one in splits]
    traces.append(
        {
            "type": "scatter",
            "mode": "text",
            "x": totals,
            "y": labels,
            "text": [f" {theme.number(total)} ms" for total in totals],
            "textposition": "middle right",
            "cliponaxis": False,
            "hoverinfo": "skip",
            "showlegend": False,
        }
    )
    layout = traced.layout(
        sentence,
        barmode="stack",
        bargap=0.35,
        xaxis=theme.axis(_MS, range=[0, 1.12 * max(totals)], tickformat=","),
        yaxis=theme.axis("", type="category", autorange="reversed", ticks="", showgrid=False),
        height=220 + 44 * min(len(many), 24),
        legend={"yref": "container", "y": 0, "yanchor": "bottom"},
        updatemenus=[_switch(len(PARTS), 1.12 * max(totals))],
    )
    layout["margin"] |= {"b": 92}
    rows = [_row(name, one) for name, one in zip(names, splits, strict=True)]
    return Picture(traces, layout, summary=f"{sentence}.", rows=rows)


def _switch(parts: int, longest: float) -> dict[str, Any]:
    """In ms, or as shares of each run's own step: a slow link makes some steps many times as long as others."""
    every: list[tuple[str, bool, dict[str, Any]]] = [
        ("in ms", True, {"barnorm": "", "xaxis.title.text": _MS, "xaxis.range": [0, longest]}),
        ("in % of a step", False, {"barnorm": "percent", "xaxis.title.text": _PERCENT, "xaxis.range": [0, 100]}),
    ]
    return traced.switch(
        [
            {"label": label, "method": "update", "args": [{"visible": [True] * parts + [totals]}, changes]}
            for label, totals, changes in every
        ]
    )


def _row(name: str, one: Split) -> Row:
    parts = {part: getattr(one, part) for part in PARTS}
    said = {part: theme.number(None if value is None else 1000 * value) for part, value in parts.items()}
    if one.exposed is not None and one.source != MEASURED:
        said["exposed"] += f" ({one.source})"
    titles = {part: f"{TITLES[part].split(' (')[0]} (ms)" for part in PARTS}
    return (
        {"Run": name, "Step (ms)": theme.number(1000 * one.total)}
        | {titles[part]: said[part] for part in PARTS}
        | {"Sent per rank": _bytes(one.bytes), "Formula": _bytes(one.formula_bytes)}
    )


def _bytes(count: float | None) -> str:
    return "–" if count is None else traced.size(count)
