"""What ranks tell each other in one update, by axis of the layout: bytes, calls, and how long computation waits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from labkit.experiment.layout import AXES
from labkit.plots import theme, traced
from labkit.plots.picture import Picture
from labkit.plots.shown import LabeledRun, shown

_PANELS = ([0.0, 0.29], [0.355, 0.645], [0.71, 1.0])


def largest(one: LabeledRun) -> dict[str, dict[str, float]]:
    """By axis, the most that any rank has: calls, bytes, wire_bytes, exposed_seconds."""
    found: dict[str, dict[str, float]] = {}
    for axes in one.data.traffic.values():
        for axis, counts in axes.items():
            known = found.setdefault(axis, dict(counts))
            found[axis] = {key: max(value, known[key]) for key, value in counts.items()}
    return found


def finding(names: list[str], loads: list[dict[str, dict[str, float]]]) -> str:
    """Which axis sends most and which one is waited for most."""
    many = len(names) > 1
    pairs = [(name, axis, counts) for name, axes in zip(names, loads, strict=True) for axis, counts in axes.items()]
    name, axis, counts = max(pairs, key=lambda pair: pair[2]["bytes"])
    waited = max(pairs, key=lambda pair: pair[2]["exposed_seconds"])
    wait = f"{theme.number(1000 * waited[2]['exposed_seconds'])} ms"
    carried = f"{traced.size(counts['bytes'])} a rank and update"

    def called(name: str, axis: str) -> str:
        return f"{axis} of {name}" if many else axis

    if waited[:2] == (name, axis):
        return f"{called(name, axis)} carries most ({carried}) and is waited for longest ({wait})"
    return f"{called(name, axis)} carries most ({carried}); {called(*waited[:2])} is waited for longest ({wait})"


def communication(runs: Iterable[Any] | Any) -> Picture:
    """Per axis (and product of axes): payload, calls and exposed time of one update, the largest over the ranks."""
    many = [one for one in shown(runs) if one.data.traffic]
    if not many:
        return traced.nothing("No traffic to show: it takes at least 2 ranks and 1 traced update")
    names, loads = traced.names(many), [largest(one) for one in many]
    axes = sorted({axis for load in loads for axis in load}, key=_order)
    per, unit = traced.unit(max(counts["bytes"] for load in loads for counts in load.values()))
    sentence = finding(names, loads)
    panels: list[tuple[str, float, str, Callable[[float], str]]] = [
        ("bytes", 1 / per, f"Payload per rank ({unit})", lambda value: traced.size(value * per)),
        ("calls", 1.0, "Calls (number)", lambda value: f"{value:,.0f}"),
        ("exposed_seconds", 1000.0, "Computation waits (ms)", theme.number),
    ]
    traces = []
    for index, (name, load) in enumerate(zip(names, loads, strict=True)):
        for at, (key, factor, title, written) in enumerate(panels):
            values = [factor * load[axis][key] if axis in load else None for axis in axes]
            traces.append(
                traced.bars(
                    index,
                    name,
                    values,
                    y=axes,
                    xaxis="x" if not at else f"x{at + 1}",
                    yaxis="y" if not at else f"y{at + 1}",
                    legendgroup=str(index),
                    showlegend=not at and len(many) > 1,
                    hovertemplate=f"%{{y}}: %{{x:.4~g}}<extra>{title}</extra>",
                    **traced.outside(["" if value is None else written(value) for value in values]),
                )
            )
    down: dict[str, Any] = {"type": "category", "categoryorder": "array", "categoryarray": axes[::-1]}
    down |= {"ticks": "", "showgrid": False}
    layout = traced.layout(
        sentence,
        bargap=0.3,
        **{
            f"xaxis{'' if not at else at + 1}": theme.axis(
                title,
                domain=_PANELS[at],
                anchor="y" if not at else f"y{at + 1}",
                range=traced.room([factor * counts[key] for load in loads for counts in load.values()]),
                nticks=5,
            )
            for at, (key, factor, title, _) in enumerate(panels)
        },
        yaxis=theme.axis("", **down),
        yaxis2=theme.axis("", anchor="x2", showticklabels=False, **down),
        yaxis3=theme.axis("", anchor="x3", showticklabels=False, **down),
        height=190 + (24 + 22 * len(many)) * min(len(axes), 16),
    )
    rows = [
        {
            "Run": name,
            "Axis": axis,
            "Payload": traced.size(load[axis]["bytes"]),
            "On the wire": traced.size(load[axis]["wire_bytes"]),
            "Calls": f"{load[axis]['calls']:,.0f}",
            "Exposed (ms)": theme.number(1000 * load[axis]["exposed_seconds"]),
        }
        for name, load in zip(names, loads, strict=True)
        for axis in axes
        if axis in load
    ]
    return Picture(traces, layout, summary=f"{sentence}.", rows=rows)


def _order(axis: str) -> tuple[int, int, str]:
    """Single axes first, in the order of the layout; products after them."""
    parts = axis.split("+")
    return len(parts), AXES.index(parts[0]) if parts[0] in AXES else len(AXES), axis
