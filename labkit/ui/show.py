"""Displays a figure statically."""

from __future__ import annotations

from typing import Any

from labkit.plots import static


def show(figure: Any) -> None:
    """Display a figure statically, so that it stays in the saved notebook, with its summary and its table below."""
    static.show(figure)
