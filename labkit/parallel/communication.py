"""What one update sends from one rank, in numbers. Imports no torch: `replicate.py` is read by forms too."""

from __future__ import annotations

from dataclasses import dataclass

Axes = dict[str, dict[str, float]]
"""Axis, or a product such as `dp_replicate+dp_shard`, to calls, bytes, wire_bytes and exposed_seconds (traffic.py)."""


@dataclass(frozen=True)
class Communication:
    """One update's communication of one rank."""

    wire_bytes: float
    """Bytes that leave the rank."""
    exposed_seconds: float
    axes: Axes

    @classmethod
    def of(cls, axes: Axes) -> Communication:
        """Over all axes."""
        sent, exposed = (sum(one[key] for one in axes.values()) for key in ("wire_bytes", "exposed_seconds"))
        return cls(sent, exposed, axes)
