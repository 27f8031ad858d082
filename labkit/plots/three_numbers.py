"""Three speed-ups of every sparse or low-precision run: in theory, of its kernels, and of the whole step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from labkit.plots import curves, theme, traced, wording
from labkit.plots.pareto import gain_of
from labkit.plots.picture import Picture, Row
from labkit.plots.shown import LabeledRun, labeled_runs
from labkit.runs import dense, kernels, steady
from labkit.runs.checked import formatted
from labkit.runs.methods import period
from labkit.runs.steady import SteadyState

MINUS = "−"
TITLES = ("Theory promises (layers)", "Kernels give (layers)", "Whole step gives")


@dataclass(frozen=True)
class _Line:
    """A run and the dense float32 run that it is compared with."""

    name: str
    run: LabeledRun
    reference: LabeledRun | None

    @property
    def theory(self) -> float | None:
        return kernels.theory(self.run.data.kernels)

    @property
    def kernel(self) -> float | None:
        return kernels.kernel(self.run.data.kernels)

    @property
    def steps(self) -> tuple[float, float, float] | None:
        """Speed-up of the step with its interval (value, low, high); None without enough steps or a dense run."""
        own, dense = _steady(self.run), _steady(self.reference)
        return steady.ratio(dense, own) if own and dense else None

    @property
    def step(self) -> float | None:
        return self.steps[0] if self.steps else None

    @property
    def is_faster(self) -> bool:
        """True if the whole interval of the step's speed-up is above 1."""
        return self.steps is not None and self.steps[1] > 1

    @property
    def times(self) -> tuple[float | None, float | None, float | None]:
        return self.theory, self.kernel, self.step

    @property
    def gap(self) -> str:
        """Difference of the held-out metric (or loss) from the dense run as text; empty if unknown."""
        if self.reference is None:
            return ""
        metric_info = self.run.data.metric
        own, dense = gain_of(self.run), gain_of(self.reference)
        metric_name = theme.plain(str(metric_info.get("key") or "metric").replace("_", " "), 20)
        if own is None or dense is None:
            metric_name = "loss"
            final_losses = [
                run.data.evaluations[-1][2].get("loss") if run.data.evaluations else None
                for run in (self.run, self.reference)
            ]
            if final_losses[0] is None or final_losses[1] is None:
                return ""
            difference = f"loss {formatted(final_losses[0] - final_losses[1], '+.3g')}"
        elif metric_info.get("unit") == "%":
            difference = f"{metric_name} {formatted(100 * (own - dense), '+.1f')} points"
        else:
            difference = f"{metric_name} {formatted(own - dense, '+.3g')}"
        steps = [run.data.first + run.data.steps for run in (self.run, self.reference)]
        difference = difference.replace("-", MINUS)
        return difference if steps[0] == steps[1] else f"{difference} ({steps[0]:,} against {steps[1]:,} steps)"


def _steady(run: LabeledRun | None) -> SteadyState | None:
    """Return the step times of the slowest rank after the warm-up; None if there are too few."""
    states = (
        [SteadyState.of(seconds.astype(float), period(run.experiment)) for seconds in run.data.seconds] if run else []
    )
    slowest = max(states, key=lambda state: state.median or 0.0, default=None)
    return None if slowest is None or slowest.reason else slowest


def three_numbers(runs: Iterable[Any] | Any) -> Picture:
    """Plot the speed-ups of each sparse or low-precision run over dense float32: three bars per run, logarithmic axis.

    Theory: multiplications by non-zero weights times bytes per element (labkit.runs.kernels). Kernels: its layers
    compared with dense ones, measured after the training. Step: the median step compared with that of a dense float32
    run among `runs` with the same workload, layout and batch.
    """
    labeled = [run for run in labeled_runs(runs) if run.data.steps and not run.is_ceiling]
    lines = [line for line in _lines(labeled) if line.run.data.kernels]
    if not lines:
        return traced.empty_picture(
            "No three numbers to show: 0 runs are sparse or in low precision and measured their kernels"
        )
    sentence = wording.opening(_finding(lines))
    labels = [_label(line) for line in lines]
    columns = list(zip(*(line.times for line in lines), strict=True))
    traces = []
    for index, (title, values) in enumerate(zip(TITLES, columns, strict=True)):
        traces.append(
            traced.bar_trace(
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
    measured = [value for column in columns for value in column if value]
    low, high = min([*measured, 0.9]), max([*measured, 1.1])
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
    uncompared = [line.name for line in lines if line.reference is None]
    note = (
        f"; there is no dense float32 run with the same workload, layout and batch for {', '.join(uncompared)}"
        if uncompared
        else ""
    )
    return Picture(traces, layout, summary=f"{sentence}{note}.", rows=[_row(line) for line in lines])


def _lines(labeled: Sequence[LabeledRun]) -> list[_Line]:
    names, experiments = traced.run_names(labeled), [run.experiment for run in labeled]
    lines = []
    for name, run in zip(names, labeled, strict=True):
        index = None if run.experiment is None else dense.find_dense_reference(run.experiment, experiments)
        lines.append(_Line(name, run, None if index is None or labeled[index] is run else labeled[index]))
    return lines


def _finding(lines: Sequence[_Line]) -> str:
    best = max(lines, key=lambda line: (line.step is not None, line.step or line.kernel or 0.0))
    sentence = f"{best.name} promises {_times(best.theory)}, its kernels give {_times(best.kernel)}"
    sentence += f" and the step {_times(best.step)}" if best.step else ", the step was not compared"
    sentence += f"; {best.gap}" if best.gap else ""
    if len(lines) == 1:
        return sentence
    compared, gains = sum(line.step is not None for line in lines), sum(line.is_faster for line in lines)
    return (
        f"{gains} of {compared} methods make{'s' * (gains == 1)} the step faster; {sentence}" if compared else sentence
    )


def _times(value: float | None) -> str:
    return "–" if value is None else f"{theme.number(value, 2)}×"


def _label(line: _Line) -> str:
    """Return the run's name and, below it, the difference of its metric."""
    return f"{theme.safe(line.name)}<br>{theme.safe(line.gap or 'no dense run to compare with')}"


def _ends(labels: Sequence[str], columns: Sequence[Sequence[float | None]]) -> list[dict[str, Any]]:
    """Return the number at the end of each bar, outside of it on either side of 1."""
    annotations = []
    for label_index in range(len(labels)):
        for index, values in enumerate(columns):
            value = values[label_index]
            annotations.append(
                {
                    "text": _times(value) if value else "not compared" if index == 2 else "not measured",
                    "x": float(math.log10(value or 1.0)),
                    "y": label_index + (index - 1) * 0.7 / 3,
                    "xref": "x",
                    "yref": "y",
                    "xanchor": "left" if (value or 1.0) >= 1 else "right",
                    "xshift": 4 if (value or 1.0) >= 1 else -4,
                    "showarrow": False,
                    "font": {"size": 12, "color": theme.INK if value else theme.MUTED},
                }
            )
    return annotations


def _row(line: _Line) -> Row:
    left_out = line.run.data.without_kernel
    metric = curves.metric_title([line.run])
    gain = gain_of(line.run)
    return {
        "Run": line.name,
        "Compared with": line.reference.data.directory.id if line.reference else "–",
        "Theory (times)": theme.number(line.theory),
        "Kernels (times)": theme.number(line.kernel),
        "Step (times)": theme.number(line.step),
        "Interval": "{1:.2f}–{2:.2f}".format(*line.steps) if line.steps else "–",
        "Step (ms)": theme.number(traced.step_ms(line.run)),
        metric: theme.figure(gain),
        "Gap": line.gap or "–",
        "Layers not measured": str(left_out),
    }
