"""Widgets: the panel, the dashboard, the Lab. Nothing but notebooks imports this."""

from labkit.ui.lab import Lab
from labkit.ui.show import show

__all__ = ["Lab", "show"]
