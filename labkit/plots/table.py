"""Tables: the comparison of runs, and the numbers of every figure."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from labkit.plots import theme

MAX_ROWS = 200


def runs_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a comparison with titles, units and formatted numbers."""
    any_titles = any(_has_own_title(row) for row in rows)
    any_flops, any_mfu = (any(row.get(key) for row in rows) for key in ("model_flops_per_second", "mfu"))
    any_methods = any(row.get("method", "plain") != "plain" for row in rows)
    return [
        {"Run": row["run_id"]}
        | ({"Title": row["title"]} if any_titles else {})
        | {
            "Layout": row["layout"],
        }
        | ({"Method": row.get("method", "plain")} if any_methods else {})
        | {
            "Ranks": row["world_size"],
            "State": row["state"],
            "Batch": row["global_batch"],
            "Steps": row["steps"],
            "Samples/s": theme.number(row["samples_per_second"]),
        }
        | ({"TFLOP/s": _tera(row.get("model_flops_per_second"))} if any_flops else {})
        | ({"MFU": _percent(row.get("mfu"))} if any_mfu else {})
        | {
            "Step (ms)": theme.number(_scaled(row["step_seconds"], 1000)),
            "Speed-up": _speedup(row),
            "Efficiency": _percent(row["efficiency"]),
            "Ceiling": theme.number(row["ceiling"]),
            "Held-out": f"{row['metric']} {theme.figure(row['final'])}" if row["final"] is not None else "–",
            "Remarks": "; ".join([*_role(row), *row["notes"]]),
        }
        for row in rows
    ]


def _has_own_title(row: Mapping[str, Any]) -> bool:
    """Return whether the run was given a title of its own."""
    return row["title"] not in (row["run_id"], f"{row['workload']} {row['layout']}")


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _tera(rate: float | None) -> str:
    """Return a rate of model FLOPs (FLOP/s) in TFLOP/s."""
    return theme.number(_scaled(rate, 1e-12))


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _speedup(row: Mapping[str, Any]) -> str:
    if row["speedup"] is None:
        return "–"
    if row["is_baseline"] or row["speedup_low"] is None:
        return theme.number(row["speedup"])
    return f"{row['speedup']:.2f} ({row['speedup_low']:.2f}–{row['speedup_high']:.2f})"


def _role(row: Mapping[str, Any]) -> list[str]:
    """Return the role of the run in the comparison in words."""
    roles = {"is_baseline": "baseline", "is_ceiling": "independent copies: the ceiling", "live": "so far"}
    return [words for key, words in roles.items() if row.get(key)]


def html_table(rows: Sequence[Mapping[str, Any]], caption: str = "", empty: str = "Nothing yet.") -> str:
    """Return an accessible HTML table with escaped cells; rows beyond MAX_ROWS are counted instead of shown."""
    if not rows:
        return f"<p>{html.escape(empty)}</p>"
    columns = list(rows[0])
    styles = [_CELL + _align(rows, column) for column in columns]
    header = "".join(
        f'<th scope="col" style="{style}">{_text(column)}</th>' for column, style in zip(columns, styles, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(_cell(row.get(column), index == 0, styles[index]) for index, column in enumerate(columns))
        + "</tr>"
        for row in rows[:MAX_ROWS]
    )
    rest = f"<p>… and {len(rows) - MAX_ROWS} more rows.</p>" if len(rows) > MAX_ROWS else ""
    title = f'<caption style="{_CAPTION}">{_text(caption)}</caption>' if caption else ""
    return (
        f'<div style="overflow-x:auto"><table style="{_TABLE}">{title}'
        f'<thead style="{_HEAD}"><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>{rest}'
    )


_TABLE = (
    "border-collapse:collapse;font-size:13px;line-height:1.35;margin:4px 0;width:auto;font-variant-numeric:tabular-nums"
)
_HEAD = "border-bottom:2px solid #9aa5b1"
_CELL = "padding:4px 14px 4px 0;white-space:nowrap;vertical-align:top;background:none;"
_CAPTION = "text-align:left;caption-side:top;color:inherit;opacity:.75;padding:2px 0 4px"


def _align(rows: Sequence[Mapping[str, Any]], column: str) -> str:
    """Return the CSS that aligns numbers to the right and words to the left."""
    values = [str(row.get(column, "")) for row in rows[:20]]
    if column == "Run":
        return "text-align:left;"
    any_number = any(value[:1].isdigit() for value in values)
    all_numeric = all(value == "–" or value.lstrip("-–")[:1].isdigit() for value in values if value)
    return "text-align:right;" if any_number and all_numeric else "text-align:left;"


def _cell(value: Any, first: bool, style: str) -> str:
    if isinstance(value, float):
        value = theme.number(value, 4)
    text = _text("" if value is None else value)
    return (
        f'<th scope="row" style="{style}font-weight:600">{text}</th>' if first else f'<td style="{style}">{text}</td>'
    )


def _text(value: Any) -> str:
    return html.escape(theme.plain(value, 300))
