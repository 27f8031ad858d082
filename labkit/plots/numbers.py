"""What numbers networks compute with: how weights and inputs are spread over the numbers that a format has, and what is
stored, multiplied and answered layer by layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from labkit.plots import theme, traced, wording
from labkit.plots.downsample import Floats
from labkit.plots.picture import Picture, Row
from labkit.plots.shown import LabeledRun, shown
from labkit.runs import numbers
from labkit.runs.numbers import Layer, Side

MOST_RUNS = 6
FEW = 20
"""So many different numbers are drawn as stems."""
ROW_PX, HEADING_PX, HEAD_PX, FOOT_PX = 150, 46, 124, 56
"""Heights: of a row with the heading above it, of that, and of what is above and below all rows."""
_SCALES = {
    "layer": "relative to the largest of the layer",
    "row": "a scale per output",
    "token": "a scale per token",
    "32 inputs": "a scale per 32 inputs",
}
_COLUMNS = ([0.0, 0.47], [0.53, 1.0])


@dataclass(frozen=True)
class _Panel:
    """The weights or the inputs of a run's layers together."""

    kind: str
    share: str
    spread: Floats
    """Part of the numbers in each bin, the middle one is zero."""
    zeros: float

    @property
    def values(self) -> int:
        """In how many bins there is anything: as many as there are different numbers, where a format has few."""
        return int((self.spread > 0).sum())

    @property
    def few(self) -> bool:
        return self.values <= FEW

    def words(self, with_zero: bool) -> str:
        """`ternary, 3 values, 31 % zero`."""
        found = [self.kind]
        if self.few or self.kind.startswith("int"):
            found.append(f"{self.values} values")
        if with_zero and self.zeros >= 0.005:
            found.append(f"{traced.percent(self.zeros)} zero")
        return ", ".join(found)


def _pooled(sides: Sequence[Side]) -> _Panel:
    """Every layer by as many numbers as it has."""
    bins = max(len(side.counts) for side in sides)
    spread, total, zeros = np.zeros(bins), 0.0, 0.0
    for side in sides:
        if len(side.counts) == bins and side.counts.sum():
            spread += side.numbers * side.counts / side.counts.sum()
            zeros += side.numbers * side.zeros
            total += side.numbers
    return _Panel(sides[0].kind, sides[0].share, spread / max(total, 1.0), zeros / max(total, 1.0))


def _chosen(one: LabeledRun, layer: str | None) -> tuple[list[Layer], str]:
    """The layers of a row of panels, and which those are in words: one, or those that multiply what most do."""
    if layer is not None:
        found = [known for known in one.data.numbers if layer in (known.name, short(known.name))]
        return found[:1], short(layer)
    groups = numbers.group_by_operands(one.data.numbers)
    words = max(groups, key=lambda name: one.data.multiplied.get(name, len(groups[name])))
    count, every = one.data.multiplied.get(words, len(groups[words])), sum(one.data.multiplied.values())
    return groups[words], f"{count} of {every or len(one.data.numbers)} layers"


def short(name: str) -> str:
    """A layer's name without what all names begin with."""
    return name.removeprefix("blocks.")


def formats(runs: Iterable[Any] | Any, layer: str | None = None) -> Picture:
    """Histograms of weights (left) and inputs (right) as they are multiplied, a row of panels a run (six at most).

    Each number is relative to the largest magnitude that has the same scale. Together stand the layers that multiply
    what most layers of the run do, or one `layer` by its name. A switch makes the vertical axes logarithmic.
    """
    many = [one for one in shown(runs) if one.data.numbers and not one.is_ceiling]
    rows = [(one, *_chosen(one, layer)) for one in many]
    rows = [row for row in rows if row[1]][:MOST_RUNS]
    if not rows:
        why = "0 runs have looked at them at their end" if layer is None else f"0 runs have a layer {layer}"
        return traced.nothing(f"No numbers to show: {why}")
    names = traced.names([one for one, *_ in rows])
    panels = [(_pooled([one.weight for one in found]), _pooled([one.input for one in found])) for _, found, _ in rows]
    sentence = wording.opening(_finding(names, panels))
    height = HEAD_PX + FOOT_PX + ROW_PX * len(rows)
    layout = traced.layout(sentence, height=height, showlegend=False)
    traces: list[dict[str, Any]] = []
    ranges: dict[str, list[dict[str, Any]]] = {"linear": [], "log": []}
    part = 1 / len(rows)
    gap = HEADING_PX / (height - HEAD_PX - FOOT_PX)
    for at, (name, pair) in enumerate(zip(names, panels, strict=True)):
        top = 1 - at * part - gap / 2
        for column, panel in enumerate(pair):
            number = "" if at + column == 0 else str(2 * at + column + 1)
            traces.append(_trace(panel, column, number))
            linear, log = _ranges(panel)
            ranges["linear"].append({f"yaxis{number}.type": "linear", f"yaxis{number}.range": linear})
            ranges["log"].append({f"yaxis{number}.type": "log", f"yaxis{number}.range": log})
            last = at == len(rows) - 1
            title = "of the largest magnitude" if last else ""
            layout[f"xaxis{number}"] = theme.axis(
                title, domain=_COLUMNS[column], anchor=f"y{number}", range=[-1.06, 1.06], showticklabels=last
            )
            share = "Share (%)" if column == 0 else ""
            layout[f"yaxis{number}"] = theme.axis(
                share, domain=[top - part + gap, top], anchor=f"x{number}", range=linear, nticks=4
            )
            begin = f"{name}: weights" if column == 0 else "inputs"
            beyond = _beyond(panel, linear, number)
            heading = traced.heading(f"{begin}, {panel.words(not beyond)}", _COLUMNS[column][0], top)
            layout["annotations"] = [*layout.get("annotations", []), heading, *beyond]
    layout["updatemenus"] = [_switch(ranges) | {"y": 1 + 0.1 * gap}]
    twin = [row for name, run, pair in zip(names, rows, panels, strict=True) for row in _rows(name, run[2], pair)]
    return Picture(traces, layout, summary=f"{sentence}.", rows=twin)


def _finding(names: Sequence[str], panels: Sequence[tuple[_Panel, _Panel]]) -> str:
    at = min(range(len(panels)), key=lambda at: (panels[at][0].values, -panels[at][0].zeros))
    weights, inputs = panels[at]
    said = f"{names[at]} multiplies {inputs.kind} × {weights.kind}"
    if weights.few:
        said += f": its weights take {weights.values} values, {traced.percent(weights.zeros)} of them are zero"
    else:
        zeros = [traced.percent(side.zeros) for side in (weights, inputs)]
        said += f": {zeros[0]} of its weights and {zeros[1]} of its inputs are zero"
    return said


def _places(panel: _Panel) -> Floats:
    return np.linspace(-1, 1, len(panel.spread))


def _trace(panel: _Panel, column: int, number: str) -> dict[str, Any]:
    """Stems where there are few numbers, a filled outline otherwise."""
    x, y = _places(panel), 100 * panel.spread
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
    """Of the vertical axis, linear and logarithmic. Zero may stand out of the linear one, and is written there then."""
    y = 100 * panel.spread
    middle = len(y) // 2
    rest = float(np.delete(y, middle).max()) if len(y) > 1 else 0.0
    top = rest if rest and y[middle] > 3 * rest else float(y.max())
    least = float(y[y > 0].min()) if (y > 0).any() else 1.0
    return [0.0, 1.12 * top or 1.0], [float(np.log10(max(least, 1e-5))) - 0.3, 2.2]


def _beyond(panel: _Panel, linear: Sequence[float], number: str) -> list[dict[str, Any]]:
    """Words where zero stands out of the panel."""
    share = 100 * panel.spread[len(panel.spread) // 2]
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
    return traced.switch(buttons)


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
            "Within a tenth of the largest": f"{100 * float(panel.spread[np.abs(_places(panel)) <= 0.1].sum()):.0f} %",
        }
        for side, panel in zip(("weights", "inputs"), pair, strict=True)
    ]


# -- layer by layer ---------------------------------------------------------------------------------------------------


def layers(run: Any) -> Picture:
    """Zeros among inputs and weights of the layers of one run, beside what is stored, multiplied and answered."""
    one = LabeledRun.of(run)
    found = one.data.numbers
    if not found:
        return traced.nothing("No layers to show: it takes a run that was evaluated at its end")
    labels = [theme.safe(short(layer.name)) for layer in found]
    every = sum(one.data.multiplied.values()) or len(found)
    sentence = wording.opening(_layers_finding(one, every))
    sides = {"Inputs (activations)": [layer.input for layer in found], "Weights": [layer.weight for layer in found]}
    traces = []
    for index, (title, side) in enumerate(sides.items()):
        zeros = [100 * each.zeros for each in side]
        traces.append(
            traced.bars(
                1 - index,
                title,
                zeros,
                y=labels,
                **traced.outside([f"{value:.0f} %" if value >= 0.5 else "" for value in zeros]),
                hovertemplate=f"%{{y}}: %{{x:.1f}} % of the {title.lower()} are zero<extra></extra>",
            )
        )
    most = max(5.0, *(100 * each.zeros for side in sides.values() for each in side))
    layout = traced.layout(
        sentence,
        barmode="group",
        bargap=0.25,
        xaxis=theme.axis("Zero, as multiplied (%)", range=[0, 1.2 * most], domain=[0, 0.5]),
        yaxis=theme.axis("", type="category", autorange="reversed", ticks="", showgrid=False),
        height=200 + 34 * min(len(found), 40),
    )
    layout["annotations"] = [_path(label, _types(layer)) for label, layer in zip(labels, found, strict=True)]
    layout["annotations"].append(traced.heading("stored → inputs × weights → answered", 0.53, 1.0))
    some = f"; shown are {len(found)}, evenly chosen" if len(found) < every else ""
    return Picture(traces, layout, summary=f"{sentence}{some}.", rows=[_layer_row(layer) for layer in found])


def _layers_finding(one: LabeledRun, every: int) -> str:
    counts = one.data.multiplied or {
        words: len(some) for words, some in numbers.group_by_operands(one.data.numbers).items()
    }
    words = max(counts, key=lambda name: counts[name])
    most = max(one.data.numbers, key=lambda layer: layer.input.zeros)
    said = f"{counts[words]} of {every} layers multiply {words}"
    if most.input.zeros >= 0.05:
        return f"{said}; most zeros come into {short(most.name)}, {traced.percent(most.input.zeros)} of its inputs"
    return f"{said}; activations are hardly ever zero ({100 * most.input.zeros:.1f} % at most)"


def _types(layer: Layer) -> str:
    factors = sorted({layer.input.factor, layer.weight.factor})
    inside = "" if all(name in layer.multiplied for name in factors) else f" (as {' and '.join(factors)})"
    return f"{layer.stored} → {layer.multiplied}{inside} → {layer.answers}"


def _path(label: str, words: str) -> dict[str, Any]:
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
        "Part on this rank": layer.part or "whole",
        "Stored": layer.stored,
        "Multiplied": layer.multiplied,
        "In memory": factors,
        "Answered": layer.answers,
        "Inputs zero": f"{100 * layer.input.zeros:.1f} %",
        "Weights zero": f"{100 * layer.weight.zeros:.1f} %",
    }
