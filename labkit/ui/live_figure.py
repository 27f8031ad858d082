"""A FigureWidget whose state in the kernel is not changed by the browser."""

from __future__ import annotations

import time
from typing import Any

import plotly.graph_objects as go
from traitlets import observe

RESIZE_S = 1.0


class LiveFigure(go.FigureWidget):  # type: ignore[misc]
    """plotly's widget with three corrections, necessary as of plotly 7.1.

    After each redraw the browser reports its defaults, and the kernel's figure drops every property that the report
    mentions: after some redraws a reloaded page shows lines without names and bars without positions. Here the report
    only signals that the browser has answered. A figure that is drawn before it is on the page stays 700 pixels wide,
    so it is resized when a view reports for the first time. The state that a reloaded page reads is renewed by
    `renew()`; plotly does that only on display.
    """

    _resized = 0.0

    @property
    def busy(self) -> bool:
        """Whether the browser has not answered the last redraw yet (always so without a browser)."""
        return bool(self._trace_edit_in_process)

    def renew(self) -> None:
        """Renew the state from which a reloaded page draws."""
        self._repr_mimebundle_()

    @observe("_js2py_traceDeltas")
    def _handler_js2py_traceDeltas(self, change: Any) -> None:
        """Note the answer of the browser without changing the figure."""
        message = change["new"]
        if not message:
            return
        if message.get("trace_edit_id") == self._last_trace_edit_id:
            self._trace_edit_in_process = False
        self._js2py_traceDeltas = None
        if time.monotonic() - self._resized > RESIZE_S:
            self._resized = time.monotonic()
            self._send_relayout_msg({"autosize": True})
