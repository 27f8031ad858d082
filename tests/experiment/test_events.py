"""The vocabulary of events is what ranks write and what readers read, name by name and field by field."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import labkit
from labkit.experiment.events import EVENTS, HEAD, Column, Structure
from labkit.runs.checked import checked_fields
from labkit.runs.events import HANDLERS
from labkit.training.after.post_training import STEPS

PACKAGE = Path(labkit.__file__).parent
HEAD_NAMES = {field.name for field in HEAD}


def writes() -> Iterator[tuple[str, str, set[str]]]:
    """Yield place, name and literal fields of every `events.write("name", …)` in labkit."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "write"):
                continue
            writer = node.func.value
            if (writer.attr if isinstance(writer, ast.Attribute) else getattr(writer, "id", "")) != "events":
                continue
            if isinstance(node.args[0], ast.Constant):
                fields = {keyword.arg for keyword in node.keywords if keyword.arg is not None}
                yield f"{path.name}:{node.lineno}", str(node.args[0].value), fields


def test_every_event_that_is_written_is_declared_and_every_declared_one_is_written() -> None:
    written = {name for _, name, _ in writes()} | {step.event for step in STEPS}
    assert written == set(EVENTS)


def test_every_field_that_is_written_is_declared() -> None:
    undeclared = {place: fields - EVENTS[name].kinds.keys() for place, name, fields in writes()}
    assert len(undeclared) > 10
    assert not {place: fields for place, fields in undeclared.items() if fields}


def test_every_declared_event_has_a_reader() -> None:
    assert set(HANDLERS) == set(EVENTS)


@pytest.mark.parametrize("name", EVENTS)
def test_no_field_is_declared_twice_or_like_one_of_every_event(name: str) -> None:
    names = [field.name for field in EVENTS[name].fields]
    assert len(names) == len({*names})
    assert not HEAD_NAMES & {*names}


@pytest.mark.parametrize(
    ("name", "field", "value", "checked"),
    [
        ("end", "step", 3, 3),
        ("end", "step", 3.0, 3),
        ("end", "step", -1, None),
        ("end", "step", True, None),
        ("end", "step", 1e9, None),
        ("end", "reason", "x" * 500, "x" * 100),
        ("end", "reason", 7, None),
        ("error", "message", "a" + "b" * 2000, "b" * 2000),
        ("evaluation", "seconds", 0.5, 0.5),
        ("evaluation", "seconds", None, None),
        ("evaluation", "seconds", "0.5", None),
        ("evaluation", "metrics", {"loss": 1, "name": "x"}, {"loss": 1.0}),
        ("evaluation", "metrics", [1], None),
        ("start", "warnings", ["a" * 500, 2], ["a" * 400, "2"]),
        ("start", "effective", {"a": 1}, {"a": "1"}),
        ("link", "bytes", 1e30, None),
        ("steps", "loss", [1, None], [1, None]),
        ("steps", "unheard_of", 1, None),
    ],
)
def test_a_field_of_another_kind_counts_as_missing(name: str, field: str, value: Any, checked: Any) -> None:
    read = checked_fields(EVENTS[name], {"event": name, field: value})
    assert read.get(field) == checked
    assert type(read.get(field)) is type(checked)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(sorted(EVENTS)), st.data())
def test_whatever_a_file_holds_the_checked_fields_are_checked_again_unchanged(name: str, data: st.DataObject) -> None:
    kinds = EVENTS[name].kinds
    event = data.draw(st.dictionaries(st.sampled_from(sorted(kinds)), anything))
    read = checked_fields(EVENTS[name], event)
    plain = {key: value for key, value in read.items() if not isinstance(kinds[key], Column | Structure)}
    again = checked_fields(EVENTS[name], plain)
    assert repr(again) == repr(plain)
