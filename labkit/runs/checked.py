"""Values of untrusted files, as what they should be or not at all."""

from __future__ import annotations

import math
from typing import Any

NOT_FINITE = "not finite"
"""What stands in summaries and on screens in place of a figure that is NaN or infinite."""


def integer(value: Any, low: int, high: int) -> int | None:
    """`value` if it is an integer between the bounds, else None (a bool is no integer here)."""
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and low <= value <= high else None


def number(value: Any) -> float | None:
    """`value` as a finite float, or None."""
    if type(value) not in (int, float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def figure(value: Any) -> float | None:
    """A measured figure as a float; NaN where it is null, NaN or infinite, None where it is no number at all.

    JSON has neither NaN nor infinity: ranks write null in their place, so null says that a figure was not finite.
    """
    if value is None or (type(value) in (int, float) and number(value) is None):
        return math.nan
    return number(value)


def figure_or_words(value: Any) -> Any:
    """The same figures, at any depth, with NOT_FINITE in place of those that are NaN or infinite."""
    if isinstance(value, dict):
        return {name: figure_or_words(item) for name, item in value.items()}
    if isinstance(value, list):
        return [figure_or_words(item) for item in value]
    return NOT_FINITE if isinstance(value, float) and not math.isfinite(value) else value


def formatted(value: float, form: str) -> str:
    """The figure in this format, or NOT_FINITE."""
    return format(value, form) if math.isfinite(value) else NOT_FINITE


def between(value: Any, low: float, high: float) -> float | None:
    """`value` as a float between the bounds, or None."""
    found = number(value)
    return found if found is not None and low <= found <= high else None
