"""Checks of values from untrusted files: a value of the expected type and range, or None."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from labkit.experiment.events import Column, Event, Figures, Integer, Kind, Number, Structure, Text, Texts, Words

NOT_FINITE = "not finite"
"""Text shown in summaries and on screens in place of a figure that is NaN or infinite."""


def integer(value: Any, low: int, high: int) -> int | None:
    """Return `value` if it is an integer between the bounds, else None (a bool does not count as an integer)."""
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and low <= value <= high else None


def number(value: Any) -> float | None:
    """Return `value` as a finite float, or None."""
    if type(value) not in (int, float):
        return None
    try:
        as_float = float(value)
    except OverflowError:
        return None
    return as_float if math.isfinite(as_float) else None


def figure(value: Any) -> float | None:
    """Return a measured figure as a float; NaN if it is null, NaN or infinite, None if it is not a number at all.

    JSON has neither NaN nor infinity: ranks write null in their place, so null means that a figure was not finite.
    """
    if value is None or (type(value) in (int, float) and number(value) is None):
        return math.nan
    return number(value)


def figure_or_words(value: Any) -> Any:
    """Return `value` with NOT_FINITE in place of every float, at any depth, that is NaN or infinite."""
    if isinstance(value, dict):
        return {name: figure_or_words(item) for name, item in value.items()}
    if isinstance(value, list):
        return [figure_or_words(item) for item in value]
    return NOT_FINITE if isinstance(value, float) and not math.isfinite(value) else value


def formatted(value: float, form: str) -> str:
    """Return the figure in this format, or NOT_FINITE."""
    return format(value, form) if math.isfinite(value) else NOT_FINITE


def between(value: Any, low: float, high: float) -> float | None:
    """Return `value` as a float between the bounds, or None."""
    as_float = number(value)
    return as_float if as_float is not None and low <= as_float <= high else None


def words(value: Any, most: int) -> dict[str, str] | None:
    """Return at most `most` items of a dict as short texts; None for anything else."""
    items = list(value.items())[:most] if isinstance(value, dict) else None
    return None if items is None else {str(key)[:100]: str(item)[:200] for key, item in items}


def figures(value: Any, most: int, read: Callable[[Any], float | None] = figure) -> dict[str, float] | None:
    """Return the numbers among at most `most` items of a dict; None for anything else.

    With `read=number` those that are not finite are left out instead of NaN.
    """
    if not isinstance(value, dict):
        return None
    read_items = ((str(key)[:100], read(item)) for key, item in list(value.items())[:most])
    return {key: as_float for key, as_float in read_items if as_float is not None}


def checked_fields(declared: Event, event: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an event that are declared and whose values are of their kinds; others are left out.

    Columns and structures are returned as they are.
    """
    fields: dict[str, Any] = {}
    for name, kind in declared.kinds.items():
        if name in event:
            value = event[name]
            if type(kind) is not Column:  # of steps, which are by far the most events, nearly all fields are columns
                value = _checked(kind, value)
            if value is not None:
                fields[name] = value
    return fields


def _checked(kind: Kind, value: Any) -> Any:
    """Return a value as a field of this kind; None if it is not of the kind."""
    match kind:
        case Structure() | Column():
            return value
        case Integer(low, high):
            return integer(value, low, high)
        case Number(low, high):
            return between(value, low, high)
        case Text(limit, keeps_end):
            return (value[-limit:] if keeps_end else value[:limit]) if isinstance(value, str) else None
        case Texts(most, limit):
            return [str(text)[:limit] for text in value[:most]] if isinstance(value, list) else None
        case Words(most):
            return words(value, most)
        case Figures(most):
            return figures(value, most)
