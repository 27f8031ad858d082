"""Decides whether live widgets can be seen."""

from __future__ import annotations

import os
from typing import Literal

Mode = Literal["live", "static"]


def mode(requested: str = "auto") -> Mode:
    """Return the requested mode, otherwise LABKIT_UI, otherwise live in a notebook kernel and static elsewhere.

    A kernel cannot distinguish an interactive notebook from an executed one (papermill leaves no mark), so a program
    that executes notebooks must use `ui="static"` or set LABKIT_UI=static. Raise ValueError for an unknown mode.
    """
    for source, value in (("ui", requested), ("LABKIT_UI", os.environ.get("LABKIT_UI") or "auto")):
        if value not in ("auto", "live", "static"):
            raise ValueError(f"{source} must be auto, live or static, got {value!r}")
        if value != "auto":
            return "live" if value == "live" else "static"
    return "live" if _in_kernel() else "static"


def _in_kernel() -> bool:
    """Return whether this process is a notebook kernel."""
    try:
        from IPython.core.getipython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()
    return shell is not None and getattr(shell, "kernel", None) is not None
