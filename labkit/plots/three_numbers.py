"""Three numbers of every sparse or narrow method: what theory promises, what the kernels give, what the step gives."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from labkit.plots import curves, theme, traced, wording
from labkit.plots.pareto import gain_of
from labkit.plots.picture import Picture, Row
from labkit.plots.shown import LabeledRun, shown
from labkit.runs import dense, kernels, steady
from labkit.runs.checked import formatted
from labkit.runs.methods import period
from labkit.runs.steady import SteadyState

MINUS = "−"
TITLES = ("Theory promises (layers)", "Kernels give (layers)", "Whole step gives")


@dataclass(frozen=True)
class _Line:
    """One run beside its dense float32 twin."""

    name: str
    one: LabeledRun
    base: LabeledRun | None

    @property
    def theory(self) -> float | None:
        return kernels.theory(self.one.data.kernels)

    @property
    def kernel(self) -> float | None:
        return kernels.kernel(self.one.data.kernels)

    @property
    def steps(self) -> tuple[float, float, float] | None:
        """With its interval; None without enough steps, or without a dense run."""
        mine, others = _steady(self.one), _steady(self.base)
        return steady.ratio(others, mine) if mine and others else None

    @property
    def step(self) -> float | None:
        return self.steps[0] if self.steps else None

    @property
    def gains(self) -> bool:
        """Is the step surely faster?"""
        return self.steps is not None and self.steps[1] > 1

    @property
    def times(self) -> tuple[float | None, float | None, float | None]:
        return self.theory, self.kernel, self.step

    @property
    def gap(self) -> str:
        """What it costs in the held-out metric (or loss), in words; empty where that is not known."""
        if self.base is None:
            return ""
        about = self.one.data.metric
        mine, others = gain_of(self.one), gain_of(self.base)
        words = theme.plain(str(about.get("key") or "metric").replace("_", " "), 20)
        if mine is None or others is None:
            words = "loss"
            ends = [
                one.data.evaluations[-1][2].get("loss") if one.data.evaluations else None
                for one in (self.one, self.base)
            ]
            if ends[0] is None or ends[1] is None:
                return ""
            difference = f"loss {formatted(ends[0] - ends[1], '+.3g')}"
        elif about.get("unit") == "%":
            difference = f"{words} {formatted(100 * (mine - others), '+.1f')} points"
        else:
            difference = f"{words} {formatted(mine - others, '+.3g')}"
        steps = [one.data.first + one.data.steps for one in (self.one, self.base)]
        difference = difference.replace("-", MINUS)
        return difference if steps[0] == steps[1] else f"{difference} ({steps[0]:,} against {steps[1]:,} updates)"


def _steady(one: LabeledRun | None) -> SteadyState | None:
    """Steps of the slowest rank after the warm-up; None where they are too few."""
    every = (
        [SteadyState.of(seconds.astype(float), period(one.experiment)) for seconds in one.data.seconds] if one else []
    )
    slowest = max(every, key=lambda each: each.median or 0.0, default=None)
    return None if slowest is None or slowest.reason else slowest


def three_numbers(runs: Iterable[Any] | Any) -> Picture:
    """How many times as fast as dense float32 each sparse or narrow run is: three bars a run, on a logarithmic axis.

    Theory: multiplications with weights that are not zero, times the bytes of a number (labkit.runs.kernels). Kernels:
    its layers beside dense ones, measured after the training. Step: the median step beside that of a dense float32 run
    among `runs` with the same workload, layout and batch.
    """
    many = [one for one in shown(runs) if one.data.steps and not one.is_ceiling]
    lines = [line for line in _lines(many) if line.one.data.kernels]
    if not lines:
        return traced.nothing("No three numbers to show: 0 runs are sparse or narrow and measured their kernels")
    sentence = wording.opening(_finding(lines))
    labels = [_label(line) for line in lines]
    columns = list(zip(*(line.times for line in lines), strict=True))
    traces = []
    for index, (title, values) in enumerate(zip(TITLES, columns, strict=True)):
        traces.append(
            traced.bars(
                index,
                title,
                [None if value is None else value - 1 for value in values],
                y=labels,
                base=[1.0] * len(lines),
                customdata=[_times(value) for value in values],
                hovertemplate=f"%{{y}}: %{{customdata}}<extra>{title}</extra>",
                showlegend=True,
            )
        )
    known = [value for column in columns for value in column if value]
    low, high = min([*known, 0.9]), max([*known, 1.1])
    axis = theme.decades(low / 1.9, high * 1.9)
    layout = traced.layout(
        sentence,
        barmode="group",
        bargap=0.3,
        bargroupgap=0.06,
        xaxis=theme.axis("Times as fast as dense float32 (1: no gain)", **axis),
        yaxis=theme.axis("", type="category", autorange="reversed", ticks="", showgrid=False),
        height=210 + 84 * min(len(lines), 20),
        shapes=[
            {
                "type": "line",
                "xref": "x",
                "yref": "paper",
                "x0": 1,
                "x1": 1,
                "y0": 0,
                "y1": 1,
                "line": {"color": theme.INK, "width": 1.5},
            }
        ],
    )
    layout["annotations"] = _ends(labels, columns)
    missing = [line.name for line in lines if line.base is None]
    more = (
        f"; no dense float32 run with the same workload, layout and batch stands beside {', '.join(missing)}"
        if missing
        else ""
    )
    return Picture(traces, layout, summary=f"{sentence}{more}.", rows=[_row(line) for line in lines])


def _lines(many: Sequence[LabeledRun]) -> list[_Line]:
    names, experiments = traced.names(many), [one.experiment for one in many]
    found = []
    for name, one in zip(names, many, strict=True):
        at = None if one.experiment is None else dense.find_dense_reference(one.experiment, experiments)
        found.append(_Line(name, one, None if at is None or many[at] is one else many[at]))
    return found


def _finding(lines: Sequence[_Line]) -> str:
    best = max(lines, key=lambda line: (line.step is not None, line.step or line.kernel or 0.0))
    said = f"{best.name} promises {_times(best.theory)}, its kernels give {_times(best.kernel)}"
    said += f" and the step {_times(best.step)}" if best.step else ", the step was not compared"
    said += f"; {best.gap}" if best.gap else ""
    if len(lines) == 1:
        return said
    compared, gains = sum(line.step is not None for line in lines), sum(line.gains for line in lines)
    return f"{gains} of {compared} methods make{'s' * (gains == 1)} the step faster; {said}" if compared else said


def _times(value: float | None) -> str:
    return "–" if value is None else f"{theme.number(value, 2)}×"


def _label(line: _Line) -> str:
    """The run's name, and what it costs."""
    return f"{theme.safe(line.name)}<br>{theme.safe(line.gap or 'no dense run to compare with')}"


def _ends(labels: Sequence[str], columns: Sequence[Sequence[float | None]]) -> list[dict[str, Any]]:
    """The number at the end of each bar, outside of it on either side of 1."""
    found = []
    for label_at in range(len(labels)):
        for index, values in enumerate(columns):
            value = values[label_at]
            found.append(
                {
                    "text": _times(value) if value else "not compared" if index == 2 else "not measured",
                    "x": float(math.log10(value or 1.0)),
                    "y": label_at + (index - 1) * 0.7 / 3,
                    "xref": "x",
                    "yref": "y",
                    "xanchor": "left" if (value or 1.0) >= 1 else "right",
                    "xshift": 4 if (value or 1.0) >= 1 else -4,
                    "showarrow": False,
                    "font": {"size": 12, "color": theme.INK if value else theme.MUTED},
                }
            )
    return found


def _row(line: _Line) -> Row:
    left_out = line.one.data.without_kernel
    metric = curves.metric_title([line.one])
    gain = gain_of(line.one)
    return {
        "Run": line.name,
        "Beside": line.base.data.directory.id if line.base else "–",
        "Theory (times)": theme.number(line.theory),
        "Kernels (times)": theme.number(line.kernel),
        "Step (times)": theme.number(line.step),
        "Interval": "{1:.2f}–{2:.2f}".format(*line.steps) if line.steps else "–",
        "Step (ms)": theme.number(traced.step_ms(line.one)),
        metric: theme.figure(gain),
        "Gap": line.gap or "–",
        "Layers not measured": str(left_out),
    }
