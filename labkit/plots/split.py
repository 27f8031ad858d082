"""Where the time of a step goes, run by run: data, computation, compression, exposed communication, optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from labkit.plots import theme, traced, wording
from labkit.plots.picture import Picture, Row
from labkit.plots.shown import labeled_runs
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
"""Indices in the palette; exposed communication gets the warning colour."""


def finding(names: Sequence[str], splits: Sequence[Split]) -> str:
    """Return the headline: the runs with the largest and the smallest fraction of exposed communication."""
    shares = [
        (parts.exposed / parts.total, name)
        for name, parts in zip(names, splits, strict=True)
        if parts.exposed and parts.total
    ]
    if not shares:
        return f"{names[0]}: {theme.number(1000 * splits[0].total)} ms a step"
    largest, slowest = max(shares)
    sentence = f"communication stalls {slowest} for {traced.percent(largest)} of a step"
    others = {
        name: parts for name, parts in zip(names, splits, strict=True) if parts.exposed is not None and name != slowest
    }
    if not others:
        return sentence
    name = min(others, key=lambda name: (others[name].exposed or 0.0) / (others[name].total or 1.0))
    parts = others[name]
    share = traced.percent((parts.exposed or 0.0) / parts.total) if parts.total else "0 %"
    return f"{sentence}, {name} for {share}"


def split(runs: Iterable[Any] | Any) -> Picture:
    """Plot the parts of a step as stacked bars, one per run: medians of a rank after the warm-up, in ms or per cent.

    With a work queue a bar is one piece of work, over all ranks. The table has the bytes that a rank sent per step,
    counted and by the formula of its method.
    """
    pairs = [(run, parts) for run in labeled_runs(runs) if (parts := split_of(run.data, run.experiment)) is not None]
    if not pairs:
        return traced.empty_picture("No step to split: 0 runs have a step after the warm-up")
    labeled, splits = [run for run, _ in pairs], [parts for _, parts in pairs]
    names = traced.run_names(labeled)
    labels = [theme.safe(name) for name in names]
    sentence = wording.opening(finding(names, splits))
    sent_texts = [f"{_bytes(parts.bytes)} sent per rank (formula {_bytes(parts.formula_bytes)})" for parts in splits]
    traces = [
        traced.bar_trace(
            _COLOURS[part],
            TITLES[part],
            [1000 * (getattr(parts, part) or 0.0) for parts in splits],
            y=labels,
            customdata=sent_texts,
            hovertemplate=f"%{{y}}: %{{x:.3~g}} ms<br>%{{customdata}}<extra>{TITLES[part]}</extra>",
        )
        for part in PARTS
    ]
    totals = [1000 * parts.total for parts in splits]
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
        height=220 + 44 * min(len(labeled), 24),
        legend={"yref": "container", "y": 0, "yanchor": "bottom"},
        updatemenus=[_switch(len(PARTS), 1.12 * max(totals))],
    )
    layout["margin"] |= {"b": 92}
    rows = [_row(name, parts) for name, parts in zip(names, splits, strict=True)]
    return Picture(traces, layout, summary=f"{sentence}.", rows=rows)


def _switch(parts: int, longest: float) -> dict[str, Any]:
    """Return the switch between ms and per cent of each run's step; slow links make some steps far longer."""
    views: list[tuple[str, bool, dict[str, Any]]] = [
        ("in ms", True, {"barnorm": "", "xaxis.title.text": _MS, "xaxis.range": [0, longest]}),
        ("in % of a step", False, {"barnorm": "percent", "xaxis.title.text": _PERCENT, "xaxis.range": [0, 100]}),
    ]
    return traced.button_row(
        [
            {"label": label, "method": "update", "args": [{"visible": [True] * parts + [totals]}, changes]}
            for label, totals, changes in views
        ]
    )


def _row(name: str, parts: Split) -> Row:
    seconds = {part: getattr(parts, part) for part in PARTS}
    texts = {part: theme.number(None if value is None else 1000 * value) for part, value in seconds.items()}
    if parts.exposed is not None and parts.source != MEASURED:
        texts["exposed"] += f" ({parts.source})"
    titles = {part: f"{TITLES[part].split(' (')[0]} (ms)" for part in PARTS}
    return (
        {"Run": name, "Step (ms)": theme.number(1000 * parts.total)}
        | {titles[part]: texts[part] for part in PARTS}
        | {"Sent per rank": _bytes(parts.bytes), "Formula": _bytes(parts.formula_bytes)}
    )


def _bytes(count: float | None) -> str:
    return "–" if count is None else traced.format_bytes(count)
