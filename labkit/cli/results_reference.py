"""The reference page of summaries, rows of comparisons and events in Markdown, from the code that writes them."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_args, get_type_hints

from labkit.cli.reference import cell
from labkit.experiment.docstrings import field_docstrings
from labkit.experiment.events import EVENTS, HEAD
from labkit.runs.comparison_row import ComparisonRow
from labkit.runs.summary import Summary

INTRODUCTION = """\
# Results of a run

What a run leaves: its summary, its row in a comparison, and the events from which both are computed. `null` means that
a figure was not measured or does not apply; a figure that is NaN or infinite is written as words in summaries and as
`null` in events. On `quantized`, `kernels` and `exported` see [sparsity and precision](sparsity_and_precision.md).
Made by `labkit fields --results --markdown`; do not edit.
"""
SUMMARY = "`run.summary()`, `labkit show RUN --json` and `summary.json` in the run directory have these keys."
ROWS = "`labkit.compare(runs).rows` and `labkit compare --json` have one row per run."
EVENT_FILES = (
    "`rank-N.jsonl` in the run directory has one event per line; rank N appends them while it trains. All have:"
)


@dataclass(frozen=True)
class ResultField:
    """One key of a result: dotted name, type in words, and meaning."""

    table: str
    """What has the key: `summary`, `row`, or `event NAME`."""
    name: str
    kind: str
    description: str


def result_fields() -> list[ResultField]:
    """Return all keys of summaries, of rows of comparisons and of events."""
    described = [*_of_dataclass("summary", Summary), *_of_dataclass("row", ComparisonRow)]
    described += [ResultField("event", field.name, str(field.kind), field.meaning) for field in HEAD]
    for event in EVENTS.values():
        table = f"event {event.name}"
        described += [ResultField(table, field.name, str(field.kind), field.meaning) for field in event.fields]
    return described


def results_page(described: list[ResultField]) -> str:
    """Return the page: one table for summaries, one for rows and one per event."""
    parts = [
        INTRODUCTION,
        f"## Summary\n\n{SUMMARY}\n\n{_table(described, 'summary')}",
        f"## Rows of a comparison\n\n{ROWS}\n\n{_table(described, 'row')}",
        f"## Events\n\n{EVENT_FILES}\n\n{_table(described, 'event')}",
    ]
    for event in EVENTS.values():
        title = f"### {event.name}\n\n{event.meaning} Written by {event.writers}."
        parts.append(f"{title}\n\n{_table(described, f'event {event.name}')}")
    return "\n".join(part + "\n" for part in parts)


def _table(described: list[ResultField], table: str) -> str:
    rows = [
        f"| `{field.name}` | {cell(field.kind)} | {cell(field.description)} |"
        for field in described
        if field.table == table
    ]
    return "\n".join(["| key | type | meaning |", "|---|---|---|", *rows])


def _of_dataclass(table: str, kind: type[Any], prefix: str = "") -> list[ResultField]:
    """Return the fields of a dataclass; those of a dataclass within it follow it, with dotted names."""
    hints, docstrings = get_type_hints(kind), field_docstrings(kind)
    described = []
    for field in fields(kind):
        parts = get_args(hints[field.name]) or (hints[field.name],)
        nested = next((part for part in parts if isinstance(part, type) and is_dataclass(part)), None)
        words = str(field.type).replace("None", "null").replace("Any", "value")
        words = words if nested is None else words.replace(nested.__name__, "object")
        described.append(ResultField(table, f"{prefix}{field.name}", words, docstrings[field.name]))
        if nested is not None:
            described += _of_dataclass(table, nested, f"{prefix}{field.name}.")
    return described
