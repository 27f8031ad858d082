"""Whether there is somebody to look at live widgets."""

from __future__ import annotations

import os
from typing import Literal

Mode = Literal["live", "static"]


def mode(wanted: str = "auto") -> Mode:
    """`live` or `static`: what was asked for, else LABKIT_UI, else live in a notebook kernel and static elsewhere.

    A kernel cannot tell a person's notebook from an executed one (papermill leaves no mark), so whoever executes
    notebooks says `ui="static"` or sets LABKIT_UI=static. Raises ValueError for another word.
    """
    for source, value in (("ui", wanted), ("LABKIT_UI", os.environ.get("LABKIT_UI") or "auto")):
        if value not in ("auto", "live", "static"):
            raise ValueError(f"{source} must be auto, live or static, got {value!r}")
        if value != "auto":
            return "live" if value == "live" else "static"
    return "live" if _in_kernel() else "static"


def _in_kernel() -> bool:
    try:
        from IPython.core.getipython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()
    return shell is not None and getattr(shell, "kernel", None) is not None
