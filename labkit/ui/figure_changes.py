"""What a redraw sends to the browser: only the properties of a figure that have changed since the last one."""

from __future__ import annotations

from typing import Any

import numpy as np

from labkit.plots import overview
from labkit.ui.live_figure import LiveFigure

Drawing = tuple[list[dict[str, Any]], dict[str, Any]]
"""Traces and layout of a figure."""


def send_changes(figure: LiveFigure, old: Drawing, new: Drawing) -> bool:
    """Change `figure`, which shows the drawing `old`, into `new` in one update; return whether a trace has changed.

    Both have the same number of traces and annotations.
    """
    (old_traces, old_layout), (traces, layout) = old, new
    changed = [_differences(before, after) for before, after in zip(old_traces, traces, strict=True)]
    with figure.batch_update():
        for trace, changes in zip(figure.data, changed, strict=True):
            for name, value in changes.items():
                trace[name] = value
        texts = zip(old_layout["annotations"], layout["annotations"], strict=True)
        for index, (before, after) in enumerate(texts):
            if before["text"] != after["text"]:
                figure.layout.annotations[index].text = after["text"]
        for name in overview.AXES:
            before, after = old_layout[name], layout[name]
            if before["title"] != after["title"]:
                figure.layout[name].title.text = after["title"]["text"]
            if before["showticklabels"] != after["showticklabels"]:
                figure.layout[name].showticklabels = after["showticklabels"]
    return any(changed)


def _differences(old: Any, new: dict[str, Any]) -> dict[str, Any]:
    """Return the properties of a trace that a redraw must replace: arrays and texts that have changed."""
    changes: dict[str, Any] = {}
    for name in ("x", "y", "text", "name", "showlegend", "mode", "hovertemplate"):
        if name in new and not _equal(old[name], new[name]):
            changes[name] = new[name]
    if new["type"] == "bar" and changes:
        changes |= {part: new[part] for part in ("error_y", "marker", "width")}
    return changes


def _equal(before: Any, after: Any) -> bool:
    """Return whether two properties of a trace are equal; NaNs are equal to each other."""
    if not isinstance(after, list | np.ndarray):
        return bool(before == after)
    return before is not None and len(before) == len(after) and np.array_equal(before, after, equal_nan=_numeric(after))


def _numeric(values: Any) -> bool:
    """Return whether values are a float array, which may contain NaN."""
    return isinstance(values, np.ndarray) and values.dtype.kind == "f"
