"""A figure with a summary in one sentence and its numbers as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from labkit.plots import static

Row = dict[str, Any]


class Picture(go.Figure):  # type: ignore[misc]
    """A plotly figure with `summary` (one sentence, plain text) and `rows` (its numbers as a table, columns by title).

    In a notebook it is displayed as a static figure with the summary and the table below, without plotly's share
    button.
    """

    _summary: str = ""
    _rows: Sequence[Row] = ()

    def __init__(self, *args: Any, summary: str = "", rows: Sequence[Row] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._summary, self._rows = summary, list(rows)

    @property
    def summary(self) -> str:
        """What the figure shows, in one sentence of plain text."""
        return self._summary

    @property
    def rows(self) -> list[Row]:
        """The numbers of the figure, one dict per row."""
        return list(self._rows)

    def _repr_mimebundle_(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return static.bundle(self)

    def _ipython_display_(self) -> None:
        static.show(self)

    def show(self, *args: Any, **kwargs: Any) -> None:
        """Display the figure in the notebook; with arguments, call plotly's `show` without its share button."""
        if args or kwargs:
            super().show(*args, **({"config": static.config()} | kwargs))
        else:
            static.show(self)


def summary_of(figure: go.Figure) -> str:
    """Return the summary of a figure in one sentence of plain text."""
    return figure.summary if isinstance(figure, Picture) else ""


def rows_of(figure: go.Figure) -> list[Row]:
    """Return the numbers of a figure as table rows."""
    return figure.rows if isinstance(figure, Picture) else []
