"""The precision with which networks compute: histograms of weights and inputs over the values of a format, and the
dtypes that each layer stores, multiplies and returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from labkit.plots import theme, traced, wording
from labkit.plots.downsample import Floats
from labkit.plots.picture import Picture, Row
from labkit.plots.shown import LabeledRun, labeled_runs
from labkit.runs import numbers
from labkit.runs.numbers import Layer, Side

MAX_RUNS = 6
MAX_STEMS = 20
"""Formats with at most this many values are drawn as stems."""
ROW_PX, HEADING_PX, HEAD_PX, FOOT_PX = 150, 46, 124, 56
"""Heights in pixels: a row with its heading, the heading alone, and the space above and below all rows."""
_SCALES = {
    "layer": "relative to the largest of the layer",
    "row": "a scale per output",
    "token": "a scale per token",
    "32 inputs": "a scale per 32 inputs",
}
_COLUMNS = ([0.0, 0.47], [0.53, 1.0])


@dataclass(frozen=True)
class _Panel:
    """The pooled weights or inputs of some layers of a run."""

    kind: str
    share: str
    densities: Floats
    """Fraction of the elements in each bin; the middle bin is zero."""
    zeros: float

    @property
    def values(self) -> int:
        """Number of bins that are not empty, which is the number of values of a format with few values."""
        return int((self.densities > 0).sum())

    @property
    def few(self) -> bool:
        return self.values <= MAX_STEMS

    def words(self, with_zero: bool) -> str:
        """Return the description of the panel: `ternary, 3 values, 31 % zero`."""
        parts = [self.kind]
        if self.few or self.kind.startswith("int"):
            parts.append(f"{self.values} values")
        if with_zero and self.zeros >= 0.005:
            parts.append(f"{traced.percent(self.zeros)} zero")
        return ", ".join(parts)


def _pooled(sides: Sequence[Side]) -> _Panel:
    """Return the pooled histogram of the layers, weighted by their numbers of elements."""
    bins = max(len(side.counts) for side in sides)
    densities, total, zeros = np.zeros(bins), 0.0, 0.0
    for side in sides:
        if len(side.counts) == bins and side.counts.sum():
            densities += side.numbers * side.counts / side.counts.sum()
            zeros += side.numbers * side.zeros
            total += side.numbers
    return _Panel(sides[0].kind, sides[0].share, densities / max(total, 1.0), zeros / max(total, 1.0))


def _chosen(run: LabeledRun, layer: str | None) -> tuple[list[Layer], str]:
    """Return the layers of a row of panels and a description: one layer, or those with the most frequent operands."""
    if layer is not None:
        layers = [candidate for candidate in run.data.numbers if layer in (candidate.name, short(candidate.name))]
        return layers[:1], short(layer)
    groups = numbers.group_by_operands(run.data.numbers)
    operands = max(groups, key=lambda name: run.data.multiplied.get(name, len(groups[name])))
    count, total = run.data.multiplied.get(operands, len(groups[operands])), sum(run.data.multiplied.values())
    return groups[operands], f"{count} of {total or len(run.data.numbers)} layers"


def short(name: str) -> str:
    """Return a layer's name without the common prefix."""
    return name.removeprefix("blocks.")


def formats(runs: Iterable[Any] | Any, layer: str | None = None) -> Picture:
    """Plot histograms of weights (left) and inputs (right) as they are multiplied, one row per run (six at most).

    Values are relative to the largest magnitude with the same scale. Pooled are the layers with the most frequent
    operands of the run, or the single `layer` of that name. A switch makes the vertical axes logarithmic.
    """
    labeled = [run for run in labeled_runs(runs) if run.data.numbers and not run.is_ceiling]
    rows = [(run, *_chosen(run, layer)) for run in labeled]
    rows = [row for row in rows if row[1]][:MAX_RUNS]
    if not rows:
        reason = "0 runs recorded them at their end" if layer is None else f"0 runs have a layer {layer}"
        return traced.empty_picture(f"No numbers to show: {reason}")
    names = traced.run_names([run for run, *_ in rows])
    panels = [
        (
            _pooled([layer_record.weight for layer_record in layers]),
            _pooled([layer_record.input for layer_record in layers]),
        )
        for _, layers, _ in rows
    ]
    sentence = wording.opening(_finding(names, panels))
    height = HEAD_PX + FOOT_PX + ROW_PX * len(rows)
    layout = traced.layout(sentence, height=height, showlegend=False)
    traces: list[dict[str, Any]] = []
    ranges: dict[str, list[dict[str, Any]]] = {"linear": [], "log": []}
    row_height = 1 / len(rows)
    gap = HEADING_PX / (height - HEAD_PX - FOOT_PX)
    for index, (name, pair) in enumerate(zip(names, panels, strict=True)):
        top = 1 - index * row_height - gap / 2
        for column, panel in enumerate(pair):
            number = "" if index + column == 0 else str(2 * index + column + 1)
            traces.append(_trace(panel, column, number))
            linear, log = _ranges(panel)
            ranges["linear"].append({f"yaxis{number}.type": "linear", f"yaxis{number}.range": linear})
            ranges["log"].append({f"yaxis{number}.type": "log", f"yaxis{number}.range": log})
            last = index == len(rows) - 1
            title = "of the largest magnitude" if last else ""
            layout[f"xaxis{number}"] = theme.axis(
                title, domain=_COLUMNS[column], anchor=f"y{number}", range=[-1.06, 1.06], showticklabels=last
            )
            axis_title = "Share (%)" if column == 0 else ""
            layout[f"yaxis{number}"] = theme.axis(
                axis_title, domain=[top - row_height + gap, top], anchor=f"x{number}", range=linear, nticks=4
            )
            subject = f"{name}: weights" if column == 0 else "inputs"
            zero_notes = _zero_note(panel, linear, number)
            heading = traced.heading(f"{subject}, {panel.words(not zero_notes)}", _COLUMNS[column][0], top)
            layout["annotations"] = [*layout.get("annotations", []), heading, *zero_notes]
    layout["updatemenus"] = [_switch(ranges) | {"y": 1 + 0.1 * gap}]
    table_rows = [
        row for name, entry, pair in zip(names, rows, panels, strict=True) for row in _rows(name, entry[2], pair)
    ]
    return Picture(traces, layout, summary=f"{sentence}.", rows=table_rows)


def _finding(names: Sequence[str], panels: Sequence[tuple[_Panel, _Panel]]) -> str:
    index = min(range(len(panels)), key=lambda index: (panels[index][0].values, -panels[index][0].zeros))
    weights, inputs = panels[index]
    sentence = f"{names[index]} multiplies {inputs.kind} × {weights.kind}"
    if weights.few:
        sentence += f": its weights take {weights.values} values, {traced.percent(weights.zeros)} of them are zero"
    else:
        zeros = [traced.percent(side.zeros) for side in (weights, inputs)]
        sentence += f": {zeros[0]} of its weights and {zeros[1]} of its inputs are zero"
    return sentence


def _centres(panel: _Panel) -> Floats:
    return np.linspace(-1, 1, len(panel.densities))


def _trace(panel: _Panel, column: int, number: str) -> dict[str, Any]:
    """Return a trace of the histogram: stems for a format with few values, a filled outline otherwise."""
    x, y = _centres(panel), 100 * panel.densities
    colour = theme.PALETTE[column]
    place = {"xaxis": f"x{number}", "yaxis": f"y{number}", "name": ("weights", "inputs")[column]}
    place |= {"hovertemplate": "%{x:.3f} of the largest: %{y:.3~g} %<extra></extra>"}
    if panel.few:
        kept = y > 0
        return place | {"type": "bar", "x": x[kept], "y": y[kept], "width": 0.022, "marker": {"color": colour}}
    pattern = {"shape": traced.PATTERNS[column], "fgcolor": colour, "bgcolor": "rgba(0,0,0,0)", "size": 6}
    return (
        place
        | {
            "type": "scatter",
            "mode": "lines",
            "x": x.astype(np.float32),
            "y": y.astype(np.float32),
            "line": {"color": colour, "width": 1.4, "shape": "hvh"},
            "fill": "tozeroy",
            "fillcolor": f"rgba({','.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))},0.25)",
        }
        | ({"fillpattern": pattern} if pattern["shape"] else {})
    )


def _ranges(panel: _Panel) -> tuple[list[float], list[float]]:
    """Return the range of the vertical axis, linear and logarithmic; the zero bin may exceed the linear one."""
    percent = 100 * panel.densities
    zero_bin = len(percent) // 2
    highest_other = float(np.delete(percent, zero_bin).max()) if len(percent) > 1 else 0.0
    top = highest_other if highest_other and percent[zero_bin] > 3 * highest_other else float(percent.max())
    lowest = float(percent[percent > 0].min()) if (percent > 0).any() else 1.0
    return [0.0, 1.12 * top or 1.0], [float(np.log10(max(lowest, 1e-5))) - 0.3, 2.2]


def _zero_note(panel: _Panel, linear: Sequence[float], number: str) -> list[dict[str, Any]]:
    """Return a note if the zero bin exceeds the panel."""
    share = 100 * panel.densities[len(panel.densities) // 2]
    if share <= linear[1]:
        return []
    return [
        {
            "text": f"zero: {share:.0f} % ↑",
            "x": 0.02,
            "y": 1,
            "xref": f"x{number}",
            "yref": f"y{number} domain",
            "xanchor": "left",
            "yanchor": "top",
            "showarrow": False,
            "font": {"size": 12, "color": theme.INK},
            "bgcolor": "rgba(255,255,255,0.7)",
        }
    ]


def _switch(ranges: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    buttons = []
    for kind, label in (("linear", "linear"), ("log", "logarithmic")):
        changes = {key: value for change in ranges[kind] for key, value in change.items()}
        buttons.append({"label": label, "method": "relayout", "args": [changes]})
    return traced.button_row(buttons)


def _rows(name: str, which: str, pair: tuple[_Panel, _Panel]) -> list[Row]:
    return [
        {
            "Run": name,
            "Layers": which,
            "Numbers": side,
            "Format": panel.kind,
            "Scale": _SCALES.get(panel.share, panel.share),
            "Values": f"{panel.values}" if panel.few or panel.kind.startswith("int") else "many",
            "Zero": f"{100 * panel.zeros:.1f} %",
            "Within a tenth of the largest": f"{100 * panel.densities[np.abs(_centres(panel)) <= 0.1].sum():.0f} %",
        }
        for side, panel in zip(("weights", "inputs"), pair, strict=True)
    ]


# -- layer by layer ---------------------------------------------------------------------------------------------------


def layers(run: Any) -> Picture:
    """Plot the zeros among inputs and weights of each layer of a run, and its dtypes: stored, multiplied, returned."""
    labeled_run = LabeledRun.of(run)
    records = labeled_run.data.numbers
    if not records:
        return traced.empty_picture("No layers to show: it takes a run that was evaluated at its end")
    labels = [theme.safe(short(layer.name)) for layer in records]
    total = sum(labeled_run.data.multiplied.values()) or len(records)
    sentence = wording.opening(_layers_finding(labeled_run, total))
    sides = {"Inputs (activations)": [layer.input for layer in records], "Weights": [layer.weight for layer in records]}
    traces = []
    for index, (title, side) in enumerate(sides.items()):
        zeros = [100 * operand.zeros for operand in side]
        traces.append(
            traced.bar_trace(
                1 - index,
                title,
                zeros,
                y=labels,
                **traced.outside_text([f"{value:.0f} %" if value >= 0.5 else "" for value in zeros]),
                hovertemplate=f"%{{y}}: %{{x:.1f}} % of the {title.lower()} are zero<extra></extra>",
            )
        )
    highest = max(5.0, *(100 * operand.zeros for side in sides.values() for operand in side))
    layout = traced.layout(
        sentence,
        barmode="group",
        bargap=0.25,
        xaxis=theme.axis("Zero, as multiplied (%)", range=[0, 1.2 * highest], domain=[0, 0.5]),
        yaxis=theme.axis("", type="category", autorange="reversed", ticks="", showgrid=False),
        height=200 + 34 * min(len(records), 40),
    )
    layout["annotations"] = [
        _type_label(label, _type_flow(layer)) for label, layer in zip(labels, records, strict=True)
    ]
    layout["annotations"].append(traced.heading("stored → inputs × weights → output", 0.53, 1.0))
    note = f"; shown are {len(records)}, evenly spaced" if len(records) < total else ""
    return Picture(traces, layout, summary=f"{sentence}{note}.", rows=[_layer_row(layer) for layer in records])


def _layers_finding(run: LabeledRun, total: int) -> str:
    counts = run.data.multiplied or {
        operands: len(group) for operands, group in numbers.group_by_operands(run.data.numbers).items()
    }
    operands = max(counts, key=lambda name: counts[name])
    most_zeros = max(run.data.numbers, key=lambda layer: layer.input.zeros)
    sentence = f"{counts[operands]} of {total} layers multiply {operands}"
    if most_zeros.input.zeros >= 0.05:
        zeros = traced.percent(most_zeros.input.zeros)
        return f"{sentence}; {short(most_zeros.name)} gets the most zeros, {zeros} of its inputs"
    return f"{sentence}; activations are hardly ever zero ({100 * most_zeros.input.zeros:.1f} % at most)"


def _type_flow(layer: Layer) -> str:
    factors = sorted({layer.input.factor, layer.weight.factor})
    dtype_note = "" if all(name in layer.multiplied for name in factors) else f" (as {' and '.join(factors)})"
    return f"{layer.stored} → {layer.multiplied}{dtype_note} → {layer.answers}"


def _type_label(label: str, words: str) -> dict[str, Any]:
    return {
        "text": theme.safe(words, 120),
        "x": 0.53,
        "y": label,
        "xref": "paper",
        "yref": "y",
        "xanchor": "left",
        "showarrow": False,
        "font": {"size": 12.5, "color": theme.INK},
    }


def _layer_row(layer: Layer) -> Row:
    factors = f"{layer.input.factor} × {layer.weight.factor}"
    return {
        "Layer": short(layer.name),
        "Weight": "×".join(map(str, layer.shape)),
        "Shard on this rank": layer.part or "full",
        "Stored": layer.stored,
        "Multiplied": layer.multiplied,
        "In memory": factors,
        "Output": layer.answers,
        "Inputs zero": f"{100 * layer.input.zeros:.1f} %",
        "Weights zero": f"{100 * layer.weight.zeros:.1f} %",
    }
