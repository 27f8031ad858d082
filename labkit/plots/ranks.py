"""The per-rank strip: what every rank does now, its step time, its memory, and the time since its last heartbeat."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from labkit.plots import theme
from labkit.plots.picture import Picture
from labkit.runs.data import RunData
from labkit.runs.straggler import straggler

RECENT = 50
"""Number of last steps over which medians are taken."""
SLOW_FACTOR = 1.25
SILENT_S = 5.0


def rank_rows(data: RunData) -> list[dict[str, Any]]:
    """Return one dict per rank: rank, state, steps, step_ms, compute_ms, memory_mb, silent_s and straggler.

    Times are medians over the last RECENT steps; straggler is a sentence in the row of that rank.
    """
    entries = data.progress.get("ranks")
    current = {
        entry["rank"]: entry
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict) and isinstance(entry.get("rank"), int)
    }
    failed = {error["rank"] for error in data.errors}
    steps, step_medians = data.rank_steps, _medians([seconds[-RECENT:] for seconds in data.seconds])
    compute_medians, slowest = _medians([seconds[-RECENT:] for seconds in data.compute]), straggler(data, RECENT)
    rows = []
    for rank, step_median in enumerate(step_medians):
        entry = current.get(rank, {})
        memory = _number(entry.get("memory_bytes")) or data.peak_memory.get(rank)
        silent = None if data.done else _number(entry.get("silent_s"))
        rows.append(
            {
                "rank": rank,
                "state": _state(data, rank, entry, rank in failed, silent),
                "steps": data.first + steps[rank],
                "step_ms": 1000 * step_median if math.isfinite(step_median) else None,
                "compute_ms": 1000 * compute_medians[rank] if math.isfinite(compute_medians[rank]) else None,
                "memory_mb": memory / 2**20 if memory else None,
                "silent_s": silent,
                "straggler": str(slowest) if slowest is not None and slowest.rank == rank else None,
            }
        )
    return rows


def _medians(columns: list[Any]) -> list[float]:
    """Return the median of each column, NaN for an empty one; in one call if all are equally long and finite."""
    if columns and len({len(column) for column in columns}) == 1 and len(columns[0]):
        table = np.stack(columns)
        if np.isfinite(table).all():
            return [float(value) for value in np.median(table, axis=1)]
    finite = [column[np.isfinite(column)] for column in columns]
    return [float(np.median(column)) if len(column) else math.nan for column in finite]


def _state(data: RunData, rank: int, entry: dict[str, Any], failed: bool, silent: float | None) -> str:
    cause = data.status.get("cause")
    if failed or (isinstance(cause, dict) and data.done and cause.get("rank") == rank and data.state == "failed"):
        return "failed"
    if data.done:
        return "ended"
    phase = theme.plain(entry.get("phase") or "starting", 20)
    return f"silent for {silent:.0f} s ({phase})" if silent is not None and silent > SILENT_S else phase


def _number(value: Any) -> float | None:
    valid = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18
    return float(value) if valid and math.isfinite(value) else None


def finding(rows: list[dict[str, Any]]) -> str:
    """Return the headline: whether the ranks keep pace, and if not, the slowest rank."""
    measured = [row for row in rows if row["step_ms"]]
    failed = [row["rank"] for row in rows if row["state"] == "failed"]
    if failed:
        return f"Rank {failed[0]} failed"
    if not measured:
        return "No rank has finished a step yet"
    for row in rows:
        if row["straggler"]:
            return str(row["straggler"]).capitalize()
    median_ms = float(np.median([row["step_ms"] for row in measured]))
    slowest = max(measured, key=lambda row: row["step_ms"])
    if len(measured) > 1 and slowest["step_ms"] > SLOW_FACTOR * median_ms:
        return (
            f"Rank {slowest['rank']} is the slowest: {theme.number(slowest['step_ms'])} ms a step, "
            f"the median rank takes {theme.number(median_ms)} ms"
        )
    pace = "keep pace: " if len(measured) > 1 else "steps in "
    return f"{theme.ranks(len(measured)).capitalize()} {pace}{theme.number(median_ms)} ms a step (median)"


def table_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with titles, units and formatted numbers."""
    return [
        {
            "Rank": row["rank"],
            "State": row["state"],
            "Step": f"{row['steps']:,}",
            "Step time (ms)": theme.number(row["step_ms"]),
            "Computing (ms)": theme.number(row["compute_ms"]),
            "Memory (MB)": theme.number(row["memory_mb"]),
            "Silent (s)": "–" if row["silent_s"] is None else f"{row['silent_s']:.1f}",
        }
        for row in rows
    ]


def ranks(data: RunData) -> Picture:
    """Plot the median step time of every rank over its last steps, with its state."""
    rows = rank_rows(data)
    sentence = finding(rows)
    colours = [theme.PALETTE[1 if row["state"] == "failed" or row["straggler"] else 0] for row in rows]
    labels = [f"rank {row['rank']}" for row in rows]
    bar = {
        "type": "bar",
        "orientation": "h",
        "y": labels,
        "x": [row["step_ms"] or 0.0 for row in rows],
        "marker": {"color": colours},
        "text": [theme.safe(row["state"]) for row in rows],
        "textposition": "auto",
        "hovertemplate": "%{y}: %{x:.3~g} ms a step, %{text}<extra></extra>",
    }
    layout = theme.layout(
        sentence,
        xaxis=theme.axis("Step time (ms, median)", rangemode="tozero"),
        yaxis=theme.axis("", autorange="reversed", type="category"),
        height=130 + 28 * max(1, min(len(rows), 32)),
        showlegend=False,
    )
    return Picture([bar], layout, summary=f"{sentence}.", rows=table_rows(rows))
