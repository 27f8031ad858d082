"""Assignments to settings by their dotted names: `training.steps=50`, as after `--set` on the command line."""

from __future__ import annotations

import json
from typing import Any, get_args

from pydantic import BaseModel

from labkit.experiment.choice import Choice
from labkit.experiment.layout import Layout
from labkit.experiment.problem import ExperimentError, Problem, unknown


def parse_assignment(text: str) -> tuple[str, Any]:
    """Split `section.field=value` into the field and its value, parsed as JSON or else kept as a string."""
    field, equals, value = text.partition("=")
    if not equals or not field.strip():
        raise ExperimentError([Problem("", f"cannot read {text!r}; write section.field=value")])
    try:
        return field.strip(), json.loads(value)
    except (ValueError, RecursionError):
        return field.strip(), value


def assign(experiment: type[BaseModel], data: dict[str, Any], field: str, value: Any) -> None:
    """Store `value` at the dotted `field` of the data of an `experiment`; raises ExperimentError if there is none.

    Choosing another method drops the options of the old one.
    """
    parts = field.split(".")
    place: Any = data
    model: Any = experiment
    for depth, part in enumerate(parts[:-1]):
        model = _section(model, part)
        if model is None or not isinstance(place, dict):
            candidates = _fields_at(experiment, parts[:depth])
            raise ExperimentError([unknown(field, part, candidates, "section")])
        if place.get(part) is None:
            place[part] = {}
        elif model is Layout and isinstance(place[part], str):
            try:
                place[part] = Layout.read_short_form(place[part])
            except ValueError as error:
                raise ExperimentError([Problem("layout", str(error))]) from None
        elif not isinstance(place[part], dict):
            section, inner = ".".join(parts[: depth + 1]), parts[depth + 1]
            raise ExperimentError([Problem(section, f"was set to {place[part]!r}, which has no field {inner}")])
        place = place[part]
    last = parts[-1]
    if isinstance(model, type) and issubclass(model, Choice):
        if last == model.SELECTOR and place.get(last) != value:
            for option in [name for name in place if name not in model.model_fields]:
                del place[option]
    elif last not in getattr(model, "model_fields", {last: None}):
        raise ExperimentError([unknown(field, last, model.model_fields)])
    if (field, value is not None) in (("training.steps", True), ("training.epochs", True)):
        # The two exclude each other: setting one clears the other, so that a recipe's length can be changed.
        place["epochs" if last == "steps" else "steps"] = None
    place[last] = value


def _section(model: Any, part: str) -> Any:
    """Return the model class of the section `part` of `model`, or None if there is none."""
    field = getattr(model, "model_fields", {}).get(part)
    if field is None:
        return None
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _fields_at(model: Any, parts: list[str]) -> list[str]:
    """Return the names of the sections at the path `parts` below `model`."""
    for part in parts:
        model = _section(model, part)
    return [name for name in getattr(model, "model_fields", {}) if _section(model, name)]
