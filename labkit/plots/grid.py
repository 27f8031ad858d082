"""The rank grid: which rank holds what."""

from __future__ import annotations

import html
from typing import Any

from labkit.experiment.layout import SHORT, Layout
from labkit.plots import theme
from labkit.plots.picture import Picture

COLUMNS = 8
MAX_CELLS = 64
_NAMES = {
    "dp_replicate": "replica",
    "dp_shard": "shard",
    "tp": "tensor part",
    "cp": "sequence part",
    "ep": "expert group",
    "pp": "stage",
}


def cells(layout: Layout, global_batch: int | None = None) -> list[dict[str, Any]]:
    """One dict a rank: rank, place (what it is on every axis), work (its share of every batch), colour index."""
    found = []
    for row in layout.grid():
        where = layout.coordinates(row["rank"])
        place = [f"{_NAMES[axis]} {where[axis]}" for axis in where if getattr(layout, axis) > 1]
        index = layout.share(row["rank"])
        found.append(
            {
                "rank": row["rank"],
                "place": place or ["whole model"],
                "work": share(global_batch, layout.data_parallel, index) if global_batch else "",
                "group": where["pp"] if layout.pp > 1 else index,
            }
        )
    return found


def share(global_batch: int, parts: int, index: int) -> str:
    """How many samples of every batch this part computes: as equal as whole samples allow."""
    count = global_batch // parts + (1 if index < global_batch % parts else 0)
    return "1 sample" if count == 1 else f"{count:,} samples"


def finding(layout: Layout, global_batch: int | None = None) -> str:
    """What the layout means, in a sentence without a full stop."""
    count = layout.world_size
    if count == 1:
        return "1 rank holds the whole model and computes every sample"
    parts = " × ".join(f"{getattr(layout, axis)} {_NAMES[axis]}s" for axis in SHORT if getattr(layout, axis) > 1)
    if layout.dp_replicate == count:
        samples = f" of {global_batch:,}" if global_batch else ""
        return f"{count} ranks hold a copy of the model each and split every batch{samples}"
    return f"{count} ranks: {parts}"


def grid(layout: Layout, global_batch: int | None = None) -> Picture:
    """The ranks of a layout as boxes; colour and words tell what each one holds."""
    boxes = cells(layout, global_batch)
    across = min(COLUMNS, len(boxes))
    shapes, notes = [], []
    for box in boxes:
        x, y = box["rank"] % across, -(box["rank"] // across)
        colour = theme.style(box["group"])[0]
        shapes.append(
            {
                "type": "rect",
                "x0": x + 0.04,
                "x1": x + 0.96,
                "y0": y + 0.08,
                "y1": y + 0.92,
                "line": {"color": colour, "width": 2},
                "fillcolor": colour,
                "opacity": 0.14,
            }
        )
        words = [f"<b>rank {box['rank']}</b>", *map(theme.safe, box["place"]), *([box["work"]] if box["work"] else [])]
        notes.append({"x": x + 0.5, "y": y + 0.5, "text": "<br>".join(words), "showarrow": False, "font": {"size": 12}})
    down = -(-len(boxes) // across)
    hidden = {"visible": False, "fixedrange": True}
    sentence = finding(layout, global_batch)
    picture = theme.layout(
        sentence,
        xaxis=hidden | {"range": [0, max(across, 4)]},
        yaxis=hidden | {"range": [1 - down, 1]},
        shapes=shapes,
        annotations=notes,
        height=84 + 92 * down,
        margin={"l": 8, "r": 8, "t": 56, "b": 8},
    )
    rows = [
        {"Rank": box["rank"], "Holds": ", ".join(box["place"])}
        | ({"Of every batch": box["work"]} if box["work"] else {})
        for box in boxes
    ]
    return Picture([], picture, summary=f"{sentence}.", rows=rows)


def grid_html(layout: Layout, global_batch: int | None = None) -> str:
    """The same grid as HTML, for the live lab: words in boxes, at most MAX_CELLS of them."""
    boxes = cells(layout, global_batch)
    drawn = "".join(_box(box) for box in boxes[:MAX_CELLS])
    more = f"<span>and {len(boxes) - MAX_CELLS} more</span>" if len(boxes) > MAX_CELLS else ""
    caption = html.escape(finding(layout, global_batch))
    return (
        f'<div role="group" aria-label="Rank grid"><div style="font-size:13px;margin:0 0 6px">{caption}.</div>'
        f'<div style="display:flex;flex-wrap:wrap;gap:6px;max-height:220px;overflow-y:auto">{drawn}{more}</div></div>'
    )


def _box(box: dict[str, Any]) -> str:
    colour = theme.style(box["group"])[0]
    words = [*box["place"], *([box["work"]] if box["work"] else [])]
    return (
        f'<div style="border:1px solid {colour};border-left:5px solid {colour};border-radius:4px;'
        f'padding:4px 12px 5px 9px;font-size:12px;line-height:1.4;min-width:84px"><b>rank {box["rank"]}</b><br>'
        f"{html.escape(' · '.join(words))}</div>"
    )
