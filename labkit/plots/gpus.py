"""The GPUs of a run over time: utilisation, power, temperature and memory, and a table with one row per GPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from labkit.plots import theme, traced
from labkit.plots.downsample import extremes
from labkit.plots.picture import Picture, Row
from labkit.plots.shown import LabeledRun
from labkit.runs.columns import Floats
from labkit.runs.data import RunData
from labkit.runs.gpu_use import GpuUse, gpu_uses
from labkit.runs.gpu_warnings import gpu_warnings
from labkit.runs.gpus import GpuHistory

PANELS = (
    ("Utilisation (%)", "utilisation", 1.0, "%"),
    ("Power (W)", "power_watts", 1.0, "W"),
    ("Temperature (°C)", "temperature_celsius", 1.0, "°C"),
    ("Memory in use (GiB)", "memory_bytes", 1 / 2**30, "GiB"),
)
"""Title, column, factor and unit of each panel, from top to bottom."""
_GAP = 0.05
_HEIGHT = (1 - _GAP * (len(PANELS) - 1)) / len(PANELS)


def table_rows(uses: list[GpuUse]) -> list[Row]:
    """Return one row per GPU with titles, units and formatted numbers."""
    return [
        {
            "GPU": theme.plain(f"{use.title} {use.name}", 60),
            "Ranks": _ranks(use.ranks),
            "Utilisation (%)": theme.number(use.utilisation_percent),
            "Memory (GiB)": _of(_scaled(use.memory_peak_bytes, 2**30), _scaled(use.memory_bytes, 2**30)),
            "Power (W)": _of(use.power_watts, use.power_limit_watts),
            "Energy (Wh)": theme.number(use.energy_watt_hours),
            "Hottest (°C)": theme.number(use.temperature_max_celsius),
            "SM clock (MHz)": _of(use.sm_clock_mhz, use.sm_clock_max_mhz),
            "Throttled (s)": _throttled(use.throttled_seconds),
            "Others (GiB)": theme.number(_scaled(use.other_bytes, 2**30)),
        }
        for use in uses
    ]


def _ranks(ranks: list[int]) -> str:
    """Return the ranks of a GPU: `0, 8, 16`, and of more than eight the first ones and their number."""
    shown = ", ".join(map(str, ranks[:8]))
    return shown if len(ranks) <= 8 else f"{shown}, … ({len(ranks)} ranks)"


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _of(value: float | None, most: float | None) -> str:
    """Return a figure and what it can be at most: `61.2 of 80.0`."""
    return theme.number(value) if value is None or most is None else f"{theme.number(value)} of {theme.number(most)}"


def _throttled(seconds: dict[str, float]) -> str:
    """Return the seconds by reason: `12 power, 3 thermal`."""
    return ", ".join(f"{theme.number(time)} {reason.replace('_', ' ')}" for reason, time in seconds.items()) or "0"


def finding(uses: list[GpuUse]) -> str:
    """Return the headline without a full stop: how busy the GPUs were, and what energy the run took."""
    shares = [use.utilisation_percent for use in uses if use.utilisation_percent is not None]
    noun = "The GPU was" if len(uses) == 1 else f"The {len(uses)} GPUs were"
    busy = f"{noun} busy for {np.mean(shares):.0f} % of the training" if shares else f"{noun} observed"
    energies = [use.energy_watt_hours for use in uses if use.energy_watt_hours is not None]
    return f"{busy} and took {theme.number(sum(energies))} Wh" if energies else busy


def sentences(data: RunData) -> list[str]:
    """Return what should be read beside the table: why figures are missing, and the warnings."""
    reason = [theme.plain(data.gpu_reason, 400)] if data.gpu_reason else []
    return [*reason, *(theme.plain(warning, 400) for warning in gpu_warnings(gpu_uses(data)))]


def gpus(run: Any) -> Picture:
    """Plot what every GPU of a run did over time; a dotted line is the power limit or the memory of the card.

    Time begins with the first step, so what comes before it is the preparation.
    """
    labeled = LabeledRun.of(run)
    histories = [history for history in labeled.data.gpus if history.records]
    if not histories:
        return traced.empty_picture(
            labeled.data.gpu_reason or "No GPUs to show: this run has none, or no figures of them"
        )
    uses = gpu_uses(labeled.data)
    sentence = finding(uses)
    began = labeled.data.began
    origin = min(history["monotonic"][0] for history in histories) if began is None else began
    traces = [
        trace
        for slot, history in enumerate(histories)
        for panel in range(len(PANELS))
        for trace in _traces(slot, history, panel, origin)
    ]
    rows = table_rows(uses)
    return Picture(traces, _layout(sentence), summary=". ".join([sentence, *sentences(labeled.data)]) + ".", rows=rows)


def _traces(slot: int, history: GpuHistory, panel: int, origin: float) -> list[dict[str, Any]]:
    """Return the line of one GPU in one panel and, if it has one, its limit as a dotted line."""
    _, column, factor, unit = PANELS[panel]
    colour, dash, _ = theme.style(slot)
    seconds = history["monotonic"] - origin
    axes = {"xaxis": _axis("x", panel), "yaxis": _axis("y", panel), "legendgroup": str(slot)}
    line = {
        "type": "scatter",
        "mode": "lines",
        "name": history.title,
        "showlegend": panel == 0,
        "line": {"color": colour, "dash": dash, "width": 1.6},
        "hovertemplate": f"%{{x:.0f}} s: %{{y:.4~g}} {unit}<extra>{history.title}</extra>",
    }
    x, y = extremes(seconds, factor * history[column])
    limit = _limit(history, column)
    return [line | axes | {"x": x, "y": y}, *([] if limit is None else [_limit_line(seconds, factor * limit, axes)])]


def _limit(history: GpuHistory, column: str) -> float | None:
    """Return what a column can be at most, in the unit of the history; None if it is unknown."""
    limits = {"power_watts": "power_limit_watts", "memory_bytes": "memory_bytes"}
    return history.facts.get(limits.get(column, ""))


def _limit_line(seconds: Floats, limit: float, axes: dict[str, Any]) -> dict[str, Any]:
    """Return a dotted horizontal line."""
    style = {"color": theme.MUTED, "dash": "dot", "width": 1}
    ends = {"x": [float(seconds[0]), float(seconds[-1])], "y": [limit, limit]}
    return {"type": "scatter", "mode": "lines", "line": style, "showlegend": False, "hoverinfo": "skip"} | axes | ends


def _axis(letter: str, panel: int) -> str:
    return letter if panel == 0 else f"{letter}{panel + 1}"


def _layout(sentence: str) -> dict[str, Any]:
    """Return the layout: four panels with one time axis."""
    axes: dict[str, Any] = {}
    for panel, (title, *_) in enumerate(PANELS):
        suffix = "" if panel == 0 else str(panel + 1)
        top = 1 - panel * (_HEIGHT + _GAP)
        last = panel == len(PANELS) - 1
        shared = {} if panel == 0 else {"matches": "x"}
        axes[f"xaxis{suffix}"] = theme.axis(
            "Time since the first step began (s)" if last else "",
            anchor=_axis("y", panel),
            showticklabels=last,
            **shared,
        )
        axes[f"yaxis{suffix}"] = theme.axis(
            title, anchor=_axis("x", panel), domain=[max(0.0, top - _HEIGHT), top], rangemode="tozero"
        )
    return traced.layout(sentence, height=720, **axes)
