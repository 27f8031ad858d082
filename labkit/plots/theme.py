"""How every figure looks: one palette, dash and marker beside colour, plain words, no button that sends data away.

The palette is Okabe and Ito's (2008), made to be told apart with every common kind of colour vision.
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
    "showSendToCloud": False,  # plotly 7 shows a button that uploads the chart unless told not to
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
    "uirevision": "labkit",  # a redraw keeps the zoom that a person has chosen
}


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with a title that carries its unit."""
    return AXIS | more | {"title": AXIS["title"] | {"text": title}}


def decades(low: float, high: float) -> dict[str, Any]:
    """A logarithmic axis from `low` to `high` (both above 0) with ticks that are written out: 0.1, 0.2, 0.5, 1, …"""
    low, high = math.log10(low), math.log10(high)
    digits = (1,) if high - low > 3 else (1, 2, 5)
    ticks = [digit * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for digit in digits]
    named = {"tickvals": ticks, "ticktext": [f"{tick:,g}" if tick < 1e6 else f"{tick:.0e}" for tick in ticks]}
    return {"type": "log", "range": [low, high], "autorange": False, "tickmode": "array"} | named


def layout(title: str, **more: Any) -> dict[str, Any]:
    """A layout whose title states the finding."""
    return LAYOUT | more | {"title": LAYOUT["title"] | {"text": wrapped(title, 88)}}


def style(index: int) -> tuple[str, str, str]:
    """Colour, dash and marker of the run at `index`; after six, colours come again with other dashes and markers."""
    at = index % len(PALETTE)
    other = (at + index // len(PALETTE)) % len(PALETTE)
    return PALETTE[at], DASHES[other], MARKERS[other]


def plain(text: Any, limit: int = 200) -> str:
    """One printable line of at most `limit` characters: control and direction-changing characters are left out."""
    line = str(text)[: 4 * limit]
    if not (line.isascii() and line.isprintable()):
        line = "".join(" " if char.isspace() else char for char in line)
        line = "".join(char for char in line if unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Cn"))
    line = line.strip()
    return line if len(line) <= limit else line[: limit - 1] + "…"


def safe(text: Any, limit: int = 60) -> str:
    """Text for a title, legend or hover label: plotly reads tags, entities and $…$ in it, so they are escaped."""
    return html.escape(plain(text, limit), quote=False).replace("$", "&#36;")


def wrapped(text: str, width: int, lines: int = 2) -> str:
    """Text for a title, broken into at most `lines` lines and escaped."""
    parts = textwrap.wrap(plain(text, 400), width, max_lines=lines, placeholder=" …")
    return "<br>".join(safe(part, 400) for part in parts)


def number(value: float | None, digits: int = 3) -> str:
    """A number for people: `1.83`, `5,400`, `0.0032`; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size >= digits - 1:
        return f"{value:,.0f}" if size < 15 else f"{value:.{digits}g}"
    if size < -4:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{digits - 1 - size}f}"


def figure(value: float | None, digits: int = 3) -> str:
    """A measured figure for people: as `number`, and `not finite` where it is NaN or infinite."""
    return number(value, digits) if value is None or math.isfinite(value) else NOT_FINITE


def ranks(count: int) -> str:
    """`1 rank`, `2 ranks`."""
    return "1 rank" if count == 1 else f"{count} ranks"
