"""What a run has used of its data, in one line for people: samples, files, columns, classes, held-out part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

MAX_SKIPPED = 4
"""Maximum number of reasons for skipped files that are shown."""


def data_used(facts: Any) -> str:
    """Return a sentence without a full stop from the facts of a task; empty if they say nothing about data.

    `facts` may come from any run directory: values of an unexpected type are left out.
    """
    return "; ".join(_parts(facts)) if isinstance(facts, dict) else ""


def _parts(facts: dict[str, Any]) -> Iterator[str]:
    for count, where in (("train_samples", "to train on"), ("test_samples", "held out")):
        if isinstance(facts.get(count), int):
            yield f"{facts[count]:,} samples {where}"
    if isinstance(files := facts.get("files"), int):
        yield f"{files:,} file{'s' * (files != 1)} for training"
    if isinstance(held_out := facts.get("held_out"), str):
        yield f"held out: {held_out}"
    for kind in ("text", "image", "label"):
        if isinstance(column := facts.get(f"{kind}_column"), str) and column:
            yield f"{kind} in column {column}"
    if isinstance(classes := facts.get("classes"), list):
        yield f"{len(classes):,} classes"
    if isinstance(skipped := facts.get("skipped_files"), dict):
        counted = [f"{count:,} ({reason})" for reason, count in skipped.items() if isinstance(count, int)]
        if counted:
            yield f"left out: {', '.join(counted[:MAX_SKIPPED])}"
