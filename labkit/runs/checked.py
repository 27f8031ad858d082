"""Values of untrusted files, as what they should be or not at all."""

from __future__ import annotations

import math
from typing import Any


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


def between(value: Any, low: float, high: float) -> float | None:
    """`value` as a float between the bounds, or None."""
    found = number(value)
    return found if found is not None and low <= found <= high else None
