"""Communication of one step by axis of the layout: bytes, calls, and exposed time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from labkit.experiment.layout import AXES
from labkit.plots import theme, traced
from labkit.plots.picture import Picture
from labkit.plots.shown import LabeledRun, labeled_runs

_PANELS = ([0.0, 0.29], [0.355, 0.645], [0.71, 1.0])


def largest(run: LabeledRun) -> dict[str, dict[str, float]]:
    """Return calls, bytes, wire_bytes and exposed_seconds by axis, the largest over the ranks."""
    by_axis: dict[str, dict[str, float]] = {}
    for axes in run.data.traffic.values():
        for axis, counts in axes.items():
            maxima = by_axis.setdefault(axis, dict(counts))
            by_axis[axis] = {key: max(value, maxima[key]) for key, value in counts.items()}
    return by_axis


def finding(names: list[str], loads: list[dict[str, dict[str, float]]]) -> str:
    """Return the headline: the axis that sends most and the axis with the longest exposed time."""
    several = len(names) > 1
    pairs = [(name, axis, counts) for name, axes in zip(names, loads, strict=True) for axis, counts in axes.items()]
    name, axis, counts = max(pairs, key=lambda pair: pair[2]["bytes"])
    longest = max(pairs, key=lambda pair: pair[2]["exposed_seconds"])
    wait = f"{theme.number(1000 * longest[2]['exposed_seconds'])} ms"
    amount = f"{traced.format_bytes(counts['bytes'])} per rank and step"

    def axis_name(name: str, axis: str) -> str:
        return f"{axis} of {name}" if several else axis

    if longest[:2] == (name, axis):
        return f"{axis_name(name, axis)} carries most ({amount}) and has the longest exposed time ({wait})"
    carries = f"{axis_name(name, axis)} carries most ({amount})"
    return f"{carries}; {axis_name(*longest[:2])} has the longest exposed time ({wait})"


def communication(runs: Iterable[Any] | Any) -> Picture:
    """Plot payload, calls and exposed time of one step per axis (and product of axes), the largest over the ranks."""
    labeled = [run for run in labeled_runs(runs) if run.data.traffic]
    if not labeled:
        return traced.empty_picture("No traffic to show: it takes at least 2 ranks and 1 traced step")
    names, loads = traced.run_names(labeled), [largest(run) for run in labeled]
    axes = sorted({axis for load in loads for axis in load}, key=_order)
    bytes_per_unit, unit = traced.byte_unit(max(counts["bytes"] for load in loads for counts in load.values()))
    sentence = finding(names, loads)
    panels: list[tuple[str, float, str, Callable[[float], str]]] = [
        (
            "bytes",
            1 / bytes_per_unit,
            f"Payload per rank ({unit})",
            lambda value: traced.format_bytes(value * bytes_per_unit),
        ),
        ("calls", 1.0, "Calls (number)", lambda value: f"{value:,.0f}"),
        ("exposed_seconds", 1000.0, "Computation waits (ms)", theme.number),
    ]
    traces = []
    for index, (name, load) in enumerate(zip(names, loads, strict=True)):
        for panel, (key, factor, title, format_value) in enumerate(panels):
            values = [factor * load[axis][key] if axis in load else None for axis in axes]
            traces.append(
                traced.bar_trace(
                    index,
                    name,
                    values,
                    y=axes,
                    xaxis="x" if not panel else f"x{panel + 1}",
                    yaxis="y" if not panel else f"y{panel + 1}",
                    legendgroup=str(index),
                    showlegend=not panel and len(labeled) > 1,
                    hovertemplate=f"%{{y}}: %{{x:.4~g}}<extra>{title}</extra>",
                    **traced.outside_text(["" if value is None else format_value(value) for value in values]),
                )
            )
    y_axis: dict[str, Any] = {"type": "category", "categoryorder": "array", "categoryarray": axes[::-1]}
    y_axis |= {"ticks": "", "showgrid": False}
    layout = traced.layout(
        sentence,
        bargap=0.3,
        **{
            f"xaxis{'' if not panel else panel + 1}": theme.axis(
                title,
                domain=_PANELS[panel],
                anchor="y" if not panel else f"y{panel + 1}",
                range=traced.axis_range([factor * counts[key] for load in loads for counts in load.values()]),
                nticks=5,
            )
            for panel, (key, factor, title, _) in enumerate(panels)
        },
        yaxis=theme.axis("", **y_axis),
        yaxis2=theme.axis("", anchor="x2", showticklabels=False, **y_axis),
        yaxis3=theme.axis("", anchor="x3", showticklabels=False, **y_axis),
        height=190 + (24 + 22 * len(labeled)) * min(len(axes), 16),
    )
    rows = [
        {
            "Run": name,
            "Axis": axis,
            "Payload": traced.format_bytes(load[axis]["bytes"]),
            "On the wire": traced.format_bytes(load[axis]["wire_bytes"]),
            "Calls": f"{load[axis]['calls']:,.0f}",
            "Exposed (ms)": theme.number(1000 * load[axis]["exposed_seconds"]),
        }
        for name, load in zip(names, loads, strict=True)
        for axis in axes
        if axis in load
    ]
    return Picture(traces, layout, summary=f"{sentence}.", rows=rows)


def _order(axis: str) -> tuple[int, int, str]:
    """Return a sort key: single axes in the order of the layout, then products of axes."""
    parts = axis.split("+")
    return len(parts), AXES.index(parts[0]) if parts[0] in AXES else len(AXES), axis
