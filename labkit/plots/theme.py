"""The style of all figures: one palette, dashes and markers in addition to colour, no button that uploads data.

The palette is Okabe and Ito's (2008), whose colours are distinguishable with every common kind of colour vision.
"""

from __future__ import annotations

import html
import math
import textwrap
import unicodedata
from typing import Any

from labkit.runs.checked import NOT_FINITE

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "cross")
INK, MUTED, FAINT, PAPER = "#1f2933", "#52606d", "#e4e7eb", "#ffffff"
FONT = "Inter, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', Arial, sans-serif"

CONFIG: dict[str, Any] = {
    "showSendToCloud": False,  # by default plotly 7 shows a button that uploads the chart
    "displaylogo": False,
    "responsive": True,
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d", "toggleSpikelines"],
}

AXIS: dict[str, Any] = {
    "gridcolor": FAINT,
    "zeroline": False,
    "linecolor": "#9aa5b1",
    "ticks": "outside",
    "tickcolor": "#9aa5b1",
    "ticklen": 4,
    "tickfont": {"size": 12, "color": MUTED},
    "title": {"font": {"size": 13, "color": MUTED}, "standoff": 8},
    "automargin": True,
}

LAYOUT: dict[str, Any] = {
    "font": {"family": FONT, "size": 13, "color": INK},
    "paper_bgcolor": PAPER,
    "plot_bgcolor": PAPER,
    "colorway": list(PALETTE),
    "title": {"x": 0, "xref": "paper", "xanchor": "left", "font": {"size": 16}},
    "margin": {"l": 64, "r": 24, "t": 64, "b": 52},
    "hoverlabel": {"font": {"family": FONT, "size": 12}},
    "legend": {"orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom", "font": {"size": 12}},
    "height": 360,
    "uirevision": "labkit",  # a redraw keeps the user's zoom
}


def axis(title: str, **more: Any) -> dict[str, Any]:
    """Return an axis with a title, which should contain the unit."""
    return AXIS | more | {"title": AXIS["title"] | {"text": title}}


def decades(low: float, high: float) -> dict[str, Any]:
    """Return a logarithmic axis from `low` to `high` (both above 0) with written-out ticks (0.1, 0.2, 0.5, 1, …)."""
    low, high = math.log10(low), math.log10(high)
    digits = (1,) if high - low > 3 else (1, 2, 5)
    ticks = [digit * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for digit in digits]
    labels = {"tickvals": ticks, "ticktext": [f"{tick:,g}" if tick < 1e6 else f"{tick:.0e}" for tick in ticks]}
    return {"type": "log", "range": [low, high], "autorange": False, "tickmode": "array"} | labels


def layout(title: str, **more: Any) -> dict[str, Any]:
    """Return a layout whose title is the headline."""
    return LAYOUT | more | {"title": LAYOUT["title"] | {"text": wrapped(title, 88)}}


def style(index: int) -> tuple[str, str, str]:
    """Return colour, dash and marker of the run at `index`; colours repeat after six with other dashes and markers."""
    colour_index = index % len(PALETTE)
    style_index = (colour_index + index // len(PALETTE)) % len(PALETTE)
    return PALETTE[colour_index], DASHES[style_index], MARKERS[style_index]


def plain(text: Any, limit: int = 200) -> str:
    """Return one printable line of at most `limit` characters without control and direction-changing characters."""
    line = str(text)[: 4 * limit]
    if not (line.isascii() and line.isprintable()):
        line = "".join(" " if char.isspace() else char for char in line)
        line = "".join(char for char in line if unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Cn"))
    line = line.strip()
    return line if len(line) <= limit else line[: limit - 1] + "…"


def safe(text: Any, limit: int = 60) -> str:
    """Return text for a title, legend or hover label with what plotly interprets escaped: tags, entities and $…$."""
    return html.escape(plain(text, limit), quote=False).replace("$", "&#36;")


def wrapped(text: str, width: int, lines: int = 2) -> str:
    """Return text for a title, broken into at most `lines` lines and escaped."""
    parts = textwrap.wrap(plain(text, 400), width, max_lines=lines, placeholder=" …")
    return "<br>".join(safe(part, 400) for part in parts)


def number(value: float | None, digits: int = 3) -> str:
    """Return a formatted number: `1.83`, `5,400`, `0.0032`; a dash for None or a number that is not finite."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if exponent >= digits - 1:
        return f"{value:,.0f}" if exponent < 15 else f"{value:.{digits}g}"
    if exponent < -4:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{digits - 1 - exponent}f}"


def figure(value: float | None, digits: int = 3) -> str:
    """Return a formatted figure: as `number`, but `not finite` if it is NaN or infinite."""
    return number(value, digits) if value is None or math.isfinite(value) else NOT_FINITE


def ranks(count: int) -> str:
    """Return a number of ranks in words: `1 rank`, `2 ranks`."""
    return "1 rank" if count == 1 else f"{count} ranks"
