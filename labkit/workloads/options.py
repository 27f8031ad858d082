"""The options of a workload, from any of the forms in which they are given."""

from __future__ import annotations

from typing import Any, TypeVar

from labkit.experiment.registry import Options

Model = TypeVar("Model", bound=Options)


def read(model: type[Model], given: Any) -> Model:
    """Return `given` as a validated `model`: an instance of it, a dict of its fields, or the workload section."""
    if isinstance(given, model):
        return given
    values = given if isinstance(given, dict) else getattr(given, "options", None)
    if not isinstance(values, dict):
        raise TypeError(f"options must be {model.__name__} or a dict of its fields, got {type(given).__name__}")
    return model(**values)
