"""The rank grid: which rank holds what."""

from __future__ import annotations

import html
import textwrap
from typing import Any

from labkit.experiment import Experiment
from labkit.experiment.layout import SHORT, Layout
from labkit.experiment.placement import Placement, axis_links, link_warnings
from labkit.plots import theme
from labkit.plots.picture import Picture

COLUMNS = 8
MAX_CELLS = 64
MAX_LINKED_RANKS = 1024
"""Up to so many ranks the links between neighbours are shown."""
_LINE_HEIGHT = 34
"""Height of a sentence of two lines below the boxes (pixels)."""
_BOX_CHARACTERS = 17
"""Characters that fit into a box if there are COLUMNS boxes per row."""
_NAMES = {
    "dp_replicate": "replica",
    "dp_shard": "shard",
    "tp": "tensor part",
    "cp": "sequence part",
    "ep": "expert group",
    "pp": "stage",
}
_SHARDED = {1: "the optimizer state", 2: "gradients and optimizer state", 3: "all model state"}
"""What dp_shard shards, by ZeRO stage."""


def cells(
    layout: Layout,
    global_batch: int | None = None,
    experiment: Experiment | None = None,
    placement: Placement | None = None,
) -> list[dict[str, Any]]:
    """Return one dict per rank: rank, place (its part on each axis), work (its share of each batch), group (colour).

    With a `placement` there is also gpu: its number in nvidia-smi.
    """
    boxes = []
    for row in layout.grid():
        coordinates = layout.coordinates(row["rank"])
        place = [
            _part_in_words(layout, axis, coordinates, experiment) for axis in coordinates if getattr(layout, axis) > 1
        ]
        index = layout.share(row["rank"])
        boxes.append(
            {
                "rank": row["rank"],
                "place": place or ["whole model"],
                "work": share(global_batch, layout.data_parallel, index) if global_batch else "",
                "group": coordinates["pp"] if layout.pp > 1 else index,
            }
            | ({} if placement is None else {"gpu": placement.gpu(row["rank"])})
        )
    return boxes


def _part_in_words(layout: Layout, axis: str, coordinates: dict[str, int], experiment: Experiment | None) -> str:
    """Return the rank's part on one axis in words."""
    index, size = coordinates[axis], getattr(layout, axis)
    if axis == "dp_shard":
        return f"shard {index} of {size} of {_SHARDED[layout.zero_stage]}"
    if axis == "pp":
        return _stages(layout, index)
    if axis == "cp":  # the zig-zag of labkit.parallel.context
        return f"sequence chunks {index} and {2 * size - 1 - index} of {2 * size}"
    if axis == "ep" and (experts := _experts(experiment)) and not experts % size:
        per_rank = experts // size
        return f"{_range('expert', index * per_rank, (index + 1) * per_rank - 1)} of {experts}"
    return f"{_NAMES[axis]} {index} of {size}" if axis == "tp" else f"{_NAMES[axis]} {index}"


def _stages(layout: Layout, index: int) -> str:
    """Return the numbers of the stages that a pp rank has by the schedule, in words."""
    stages, count = layout.stages(index), layout.pp * layout.stages_per_rank
    if len(stages) > 1 and not layout.order.is_known:
        return f"{len(stages)} of {count} stages"
    if len(stages) == 1:
        return f"stage {stages[0]} of {count}"
    return f"stages {', '.join(map(str, stages[:-1]))} and {stages[-1]} of {count}"


def _experts(experiment: Experiment | None) -> int:
    """Return the number of experts in every mixture; 0 without mixtures."""
    count = experiment.workload.options.get("experts", 0) if experiment is not None else 0
    return count if isinstance(count, int) else 0


def _range(noun: str, first: int, last: int) -> str:
    return f"{noun} {first}" if first == last else f"{noun}s {first}–{last}"


def share(global_batch: int, parts: int, index: int) -> str:
    """Return how many samples of each batch this rank computes, in words; the shares differ by one sample at most."""
    count = global_batch // parts + (1 if index < global_batch % parts else 0)
    return "1 sample" if count == 1 else f"{count:,} samples"


def finding(layout: Layout, global_batch: int | None = None) -> str:
    """Return the meaning of the layout as a sentence without a full stop."""
    count = layout.world_size
    if count == 1:
        return "1 rank holds the whole model and computes every sample"
    parts = " × ".join(f"{getattr(layout, axis)} {_NAMES[axis]}s" for axis in SHORT if getattr(layout, axis) > 1)
    if layout.dp_replicate == count:
        samples = f" of {global_batch:,}" if global_batch else ""
        return f"{count} ranks hold a copy of the model each and split every batch{samples}"
    return f"{count} ranks: {parts}"


def _name(box: dict[str, Any]) -> str:
    """Return the title of a box: `rank 3`, with a placement `rank 3 · GPU 1`."""
    return f"rank {box['rank']}" + (f" · GPU {box['gpu']}" if "gpu" in box else "")


def link_sentences(layout: Layout, placement: Placement | None) -> list[str]:
    """Return the links between neighbours along each axis in one sentence, and the warnings; without full stops."""
    if placement is None or layout.world_size > MAX_LINKED_RANKS:
        return []
    links = "; ".join(map(str, axis_links(layout, placement)))
    return [*([f"Links: {links}"] if links else []), *(f"Warning: {each}" for each in link_warnings(layout, placement))]


def grid(
    layout: Layout,
    global_batch: int | None = None,
    experiment: Experiment | None = None,
    placement: Placement | None = None,
) -> Picture:
    """Draw the ranks of a layout as boxes whose colour and text show what each rank holds.

    `experiment` adds the number of experts, which the layout does not contain; `placement` adds the GPU of each rank
    and the links between neighbours.
    """
    boxes = cells(layout, global_batch, experiment, placement)
    longest = max(len(words) for box in boxes for words in (*box["place"], box["work"]))
    columns = COLUMNS if longest <= _BOX_CHARACTERS else COLUMNS // 2
    across = min(columns, len(boxes))
    wrap_width = _BOX_CHARACTERS * COLUMNS // max(across, 4)
    lines = [
        [f"<b>{_name(box)}</b>"]
        + [theme.safe(part) for words in (*box["place"], box["work"]) for part in textwrap.wrap(words, wrap_width)]
        for box in boxes
    ]
    shapes, notes = [], []
    for box, words in zip(boxes, lines, strict=True):
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
        notes.append({"x": x + 0.5, "y": y + 0.5, "text": "<br>".join(words), "showarrow": False, "font": {"size": 12}})
    row_count = -(-len(boxes) // across)
    hidden = {"visible": False, "fixedrange": True}
    sentence = finding(layout, global_batch)
    below = link_sentences(layout, placement)
    notes += [_below(number, text) for number, text in enumerate(below)]
    picture = theme.layout(
        sentence,
        xaxis=hidden | {"range": [0, max(across, 4)]},
        yaxis=hidden | {"range": [1 - row_count, 1]},
        shapes=shapes,
        annotations=notes,
        height=84 + max(92, 34 + 18 * max(map(len, lines))) * row_count + _LINE_HEIGHT * len(below),
        margin={"l": 8, "r": 8, "t": 56, "b": 8 + _LINE_HEIGHT * len(below)},
    )
    rows = [
        {"Rank": box["rank"], "Holds": ", ".join(box["place"])}
        | ({"Of every batch": box["work"]} if box["work"] else {})
        | ({"GPU": box["gpu"]} if "gpu" in box else {})
        for box in boxes
    ]
    return Picture([], picture, summary=". ".join([sentence, *below]) + ".", rows=rows)


def _below(number: int, text: str) -> dict[str, Any]:
    """Return a sentence below the boxes, the first one at the top."""
    place = {"x": 0, "y": 0, "xref": "paper", "yref": "paper", "xanchor": "left", "yanchor": "top"}
    style = {"showarrow": False, "align": "left", "font": {"size": 12, "color": theme.MUTED}}
    return {"text": theme.wrapped(text, 130, lines=2), "yshift": -_LINE_HEIGHT * number} | place | style


def grid_html(
    layout: Layout,
    global_batch: int | None = None,
    experiment: Experiment | None = None,
    placement: Placement | None = None,
) -> str:
    """Return the same grid as HTML for the live lab, with at most MAX_CELLS boxes."""
    boxes = cells(layout, global_batch, experiment, placement)
    drawn = "".join(_box(box) for box in boxes[:MAX_CELLS])
    more = f"<span>and {len(boxes) - MAX_CELLS} more</span>" if len(boxes) > MAX_CELLS else ""
    caption = html.escape(". ".join([finding(layout, global_batch), *link_sentences(layout, placement)]))
    return (
        f'<div role="group" aria-label="Rank grid"><div style="font-size:13px;margin:0 0 6px">{caption}.</div>'
        f'<div style="display:flex;flex-wrap:wrap;gap:6px;max-height:220px;overflow-y:auto">{drawn}{more}</div></div>'
    )


def _box(box: dict[str, Any]) -> str:
    colour = theme.style(box["group"])[0]
    words = [*box["place"], *([box["work"]] if box["work"] else [])]
    return (
        f'<div style="border:1px solid {colour};border-left:5px solid {colour};border-radius:4px;'
        f'padding:4px 12px 5px 9px;font-size:12px;line-height:1.4;min-width:84px"><b>{_name(box)}</b><br>'
        f"{html.escape(' · '.join(words))}</div>"
    )
