"""Static display of a figure: a mime bundle that shows without a kernel, with its summary and its table."""

from __future__ import annotations

import copy
import html
import json
import sys
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from labkit.plots import theme
from labkit.plots.table import html_table

PLOTLY_MIME = "application/vnd.plotly.v1+json"


def config() -> dict[str, Any]:
    """Return a copy of the plotly settings of every figure (plotly modifies the one it gets)."""
    return copy.deepcopy(theme.CONFIG)


def bundle(figure: go.Figure) -> dict[str, Any]:
    """Return the mime bundle for a saved notebook (a few kB): the figure, its summary, and its table as HTML."""
    data = json.loads(figure.to_json())  # numbers as base64 typed arrays, no template: plotly's own is 7 kB a figure
    data.get("layout", {}).pop("template", None)
    data["config"] = config()
    return {PLOTLY_MIME: data, "text/html": details(figure, opened=True), "text/plain": _summary(figure)}


def details(figure: go.Figure, opened: bool = False) -> str:
    """Return the summary with an expandable table as accessible HTML."""
    rows = getattr(figure, "rows", [])
    sentence = html.escape(_summary(figure))
    style = f"font-family:{html.escape(theme.FONT)};font-size:13px"
    if not rows:
        return f'<p style="{style}">{sentence}</p>'
    return (
        f'<details style="{style}"{" open" if opened else ""}><summary>{sentence}</summary>'
        f"{html_table(rows, caption='The numbers of the figure')}</details>"
    )


def show(figure: go.Figure, display_id: str | None = None, update: bool = False) -> None:
    """Display the figure statically, and below it the summary with the table."""
    from IPython.core.getipython import get_ipython
    from IPython.display import display

    if get_ipython() is None:  # a plain script cannot display figures
        sys.stdout.write(f"{_summary(figure)}\n")
        return
    figure_bundle = bundle(figure)
    table_bundle = {"text/html": details(figure), "text/plain": ""}
    figure_bundle.pop("text/html")  # the table is an output of its own, below the figure
    display_options = {"display_id": display_id, "update": update} if display_id else {}
    display(figure_bundle, raw=True, **display_options)  # type: ignore[no-untyped-call]
    display(table_bundle, raw=True, **({**display_options, "display_id": f"{display_id}-table"} if display_id else {}))  # type: ignore[no-untyped-call]


def accordion(title: str, figures: Sequence[go.Figure]) -> None:
    """Display the summaries and tables of figures in an accordion; do nothing without figures or a notebook."""
    from IPython.core.getipython import get_ipython
    from IPython.display import display

    if get_ipython() is None or not figures:
        return
    style = f"font-family:{html.escape(theme.FONT)};font-size:13px"
    content = "".join(details(figure) for figure in figures)
    text = "\n".join(_summary(figure) for figure in figures)
    html_text = f'<details style="{style}"><summary>{html.escape(title)}</summary>{content}</details>'
    display({"text/html": html_text, "text/plain": text}, raw=True)  # type: ignore[no-untyped-call]


def _summary(figure: go.Figure) -> str:
    return getattr(figure, "summary", "") or "A figure without a summary."
