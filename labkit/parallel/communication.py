"""What one rank sends in one update, in numbers. Imports no torch: `replicate.py` is read by forms too."""

from __future__ import annotations

from dataclasses import dataclass

Axes = dict[str, dict[str, float]]
"""Axis, or a product such as `dp_replicate+dp_shard`, to calls, bytes, wire_bytes and exposed_seconds (traffic.py)."""


@dataclass(frozen=True)
class Communication:
    """Communication of one rank in one update."""

    wire_bytes: float
    """Bytes that leave the rank."""
    exposed_seconds: float
    """Time in which computation waited for communication."""
    axes: Axes

    @classmethod
    def from_axes(cls, axes: Axes) -> Communication:
        """Add up the bytes and seconds of all axes."""
        sent, exposed = (sum(axis[key] for axis in axes.values()) for key in ("wire_bytes", "exposed_seconds"))
        return cls(sent, exposed, axes)
