"""Speed-up of several ranks over one: measured, ideal, and the ceiling of the machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from labkit.plots import theme
from labkit.plots.picture import Picture

Rows = Sequence[Mapping[str, Any]]


def bars(rows: Rows) -> list[dict[str, Any]]:
    """Return one bar per layout, of its latest run that did not fail: label, value, low, high, ideal, ceiling."""
    latest: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for row in rows:
        if row["speedup"] is not None and not row["is_ceiling"] and row["state"] != "failed":
            latest[(row["workload"], row["world_size"], row["layout"])] = row
    rows_to_draw = sorted(latest.values(), key=lambda row: (row["world_size"], str(row["workload"])))
    workloads = {row["workload"] for row in rows_to_draw}
    sizes = [row["world_size"] for row in rows_to_draw]
    result = []
    for row in rows_to_draw:
        name = theme.ranks(row["world_size"])
        if sizes.count(row["world_size"]) > 1 and len(workloads) == 1:
            name = f"{name} ({row['layout']})"
        if len(workloads) > 1:
            name = f"{row['workload']}, {name}"
        low, high = row.get("speedup_low"), row.get("speedup_high")
        result.append(
            {
                "label": name,
                "ranks": row["world_size"],
                "value": row["speedup"],
                "low": row["speedup"] if low is None else low,
                "high": row["speedup"] if high is None else high,
                "ideal": row["world_size"],
                "ceiling": row["ceiling"],
                "baseline": row["is_baseline"],
                "live": bool(row.get("live")),
            }
        )
    return result


def finding(rows: Rows) -> str:
    """Return the headline: `2 ranks train 1.83 times faster than 1 (ceiling 1.95)`, or why nothing can be claimed."""
    claims = [bar for bar in bars(rows) if bar["ranks"] > 1]
    if not claims:
        notes = sorted({str(note) for row in rows for note in row["notes"]})
        if any(row["is_baseline"] for row in rows):
            reason = notes[0] if notes else "run it on several ranks"
        else:
            reason = notes[0] if notes else "run the baseline, one rank"
        return f"No speed-up yet: {reason}"
    best = max(claims, key=lambda bar: bar["value"])
    ceiling = f" (ceiling {best['ceiling']:.2f})" if best["ceiling"] else ""
    so_far = " so far" if best["live"] else ""
    if best["low"] <= 1 <= best["high"] and best["low"] < best["high"]:
        return (
            f"{best['ranks']} ranks train about as fast as 1 ({best['low']:.2f} to {best['high']:.2f} times){ceiling}"
        )
    if best["value"] < 1:
        return f"{best['ranks']} ranks train {1 / best['value']:.2f} times slower than 1{so_far}{ceiling}"
    return f"{best['ranks']} ranks train {best['value']:.2f} times faster than 1{so_far}{ceiling}"


def traces(rows: Rows, **properties: Any) -> list[dict[str, Any]]:
    """Return three traces, always: the bars with their intervals, the ideal line, the markers of the ceiling."""
    drawn = bars(rows)
    labels = [theme.safe(bar["label"]) for bar in drawn]
    with_ceiling = [bar for bar in drawn if bar["ceiling"]]
    return [
        {
            "type": "bar",
            "name": "Measured",
            "x": labels,
            "y": [bar["value"] for bar in drawn],
            "width": 0.5,
            "marker": {
                "color": [theme.MUTED if bar["baseline"] else theme.PALETTE[0] for bar in drawn],
                "opacity": [0.6 if bar["live"] else 1.0 for bar in drawn],
            },
            "error_y": {
                "type": "data",
                "symmetric": False,
                "array": [bar["high"] - bar["value"] for bar in drawn],
                "arrayminus": [bar["value"] - bar["low"] for bar in drawn],
                "color": theme.INK,
                "thickness": 1.5,
                "width": 6,
            },
            "text": [f"{bar['value']:.2f}×" for bar in drawn],
            "textposition": "inside",
            "insidetextanchor": "start",
            "textangle": 0,
            "textfont": {"size": 15, "color": "#ffffff"},
            "hovertemplate": "%{x}: %{y:.2f} times the baseline<extra>measured, 95 % interval</extra>",
            "showlegend": False,
        }
        | properties,
        {
            "type": "scatter",
            "name": "Ideal: equal to the number of ranks",
            "mode": "lines+markers",
            "x": labels,
            "y": [bar["ideal"] for bar in drawn],
            "line": {"color": theme.MUTED, "dash": "dash", "width": 1.5},
            "marker": {"symbol": "line-ew", "size": 22, "line": {"color": theme.MUTED, "width": 2}},
            "hovertemplate": "%{x}: ideal %{y}<extra></extra>",
            "legend": "legend2",
            "showlegend": bool(drawn),
        }
        | properties,
        {
            "type": "scatter",
            "name": "Ceiling: independent copies",
            "mode": "markers",
            "x": [theme.safe(bar["label"]) for bar in with_ceiling],
            "y": [bar["ceiling"] for bar in with_ceiling],
            "marker": {
                "symbol": "diamond",
                "size": 12,
                "color": theme.PALETTE[4],
                "line": {"color": theme.INK, "width": 1.2},
            },
            "hovertemplate": "%{x}: the machine allows %{y:.2f}<extra></extra>",
            "legend": "legend2",
            "showlegend": bool(with_ceiling),
        }
        | properties,
    ]


def speedup(comparison: Any) -> Picture:
    """Plot the speed-up over the baseline with its 95 % interval, the ideal and the ceiling.

    `comparison` is the result of `labkit.runs.compare.compare`, or its rows.
    """
    rows = getattr(comparison, "rows", comparison)
    baseline = getattr(comparison, "baseline_run_id", None)
    sentence = finding(rows)
    baseline_note = f"; baseline {theme.plain(baseline)}" if baseline else ""
    layout = theme.layout(
        sentence,
        xaxis=theme.axis("Ranks", type="category"),
        yaxis=theme.axis("Speed-up (times the throughput of 1 rank)", rangemode="tozero"),
        legend2=theme.LAYOUT["legend"] | {"y": -0.22, "yanchor": "top"},
        margin=theme.LAYOUT["margin"] | {"b": 92},
    )
    table_rows = [
        {
            "Ranks": bar["label"],
            "Speed-up": f"{bar['value']:.2f}",
            "95 % interval": "–" if bar["low"] == bar["high"] else f"{bar['low']:.2f} to {bar['high']:.2f}",
            "Ideal": bar["ideal"],
            "Ceiling": theme.number(bar["ceiling"]),
            "Efficiency": f"{100 * bar['value'] / bar['ranks']:.0f} %",
        }
        for bar in bars(rows)
    ]
    return Picture(traces(rows), layout, summary=f"{sentence}{baseline_note}.", rows=table_rows)
