"""Widgets: the panel, the dashboard and the Lab. Only notebooks import this package."""

from labkit.ui.lab import Lab
from labkit.ui.show import show

__all__ = ["Lab", "show"]
