"""The link rate at which each method stops paying off: step time against link rate, measured and by formula."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from labkit.experiment import Experiment
from labkit.plots import theme, traced, wording
from labkit.plots.picture import Picture, Row
from labkit.plots.shown import LabeledRun, labeled_runs
from labkit.runs.break_even import BreakEven, Cost, cost
from labkit.runs.break_even import break_even as break_even_of
from labkit.runs.compare import differences
from labkit.runs.methods import is_plain

SLOWEST, FASTEST = 10.0, 100_000.0
"""Range of the link rate in Mbit/s, from a bad radio link to a data centre."""
NO_LIMIT = 4 * FASTEST
"""X position of points that were measured on the machine's own link."""
NOTHING_TO_SHOW = (
    "No break-even to show: it takes 1 run of plain averaging and 1 of another method on as many ranks, "
    "with their bytes counted"
)


@dataclass(frozen=True)
class _Method:
    """All runs of one method, and the cost of a step."""

    name: str
    runs: list[LabeledRun]
    cost: Cost

    def points(self) -> list[tuple[float | None, float]]:
        """Return (link rate in Mbit/s or None, measured step time in ms) of each run."""
        points = []
        for run in self.runs:
            network = run.experiment.launch.network if run.experiment else None
            step = traced.step_ms(run)
            if step is not None:
                points.append((None if network is None else network.rate_mbit, step))
        return points


def break_even(runs: Iterable[Any] | Any) -> Picture:
    """Plot the step time of each method against the link rate: lines by compute + bytes / rate, points as measured.

    Computation and bytes of the lines are measured, too. All ranks share one link, as with `launch.network`. Runs of
    one method on several links count together. Methods whose ranks take work from a queue do not wait for a link and
    are left out.
    """
    methods = _methods(labeled_runs(runs))
    if len(methods) < 2:
        return traced.empty_picture(NOTHING_TO_SHOW)
    plain, others = methods[0], methods[1:]
    crossings = [break_even_of(plain.cost, method.cost) for method in others]
    sentence = wording.opening(finding([method.name for method in others], crossings))
    rates = np.geomspace(SLOWEST, FASTEST, 61)
    traces: list[dict[str, Any]] = []
    for index, method in enumerate(methods):
        crossing = None if not index else crossings[index - 1]
        no_limit_x = NO_LIMIT * 1.12 ** (index - len(methods) / 2)
        traces += _method_traces(index, method, rates, crossing, no_limit_x)
    free = any(rate is None for method in methods for rate, _ in method.points())
    layout = traced.layout(
        sentence,
        xaxis=theme.axis(
            "Rate of the link that all ranks share",
            type="log",
            tickvals=[10, 100, 1000, 10_000, 100_000, *([NO_LIMIT] if free else [])],
            ticktext=["10 Mbit/s", "100 Mbit/s", "1 Gbit/s", "10 Gbit/s", "100 Gbit/s", "no limit"],
            range=[math.log10(SLOWEST), math.log10(1.6 * NO_LIMIT if free else 1.1 * FASTEST)],
        ),
        yaxis=theme.axis("Step (ms)", **_y_range(traces)),
        legend={"y": -0.2, "yanchor": "top"},
        height=520,
    )
    layout["margin"] |= {"t": 92}
    rows = [_row(method, None if not index else crossings[index - 1]) for index, method in enumerate(methods)]
    return Picture(traces, layout, summary=f"{sentence}.", rows=rows)


def _y_range(traces: Sequence[dict[str, Any]]) -> dict[str, Any]:
    values = np.concatenate([np.asarray(trace["y"], dtype=np.float64) for trace in traces])
    return theme.decades(0.7 * values.min(), 1.3 * values.max())


def applies(runs: Sequence[LabeledRun]) -> bool:
    """Return whether there is a method to compare with plain averaging."""
    return len(_methods(runs)) > 1


def _methods(runs: Sequence[LabeledRun]) -> list[_Method]:
    """Return plain averaging, then the methods that differ from it only in how gradients are combined."""
    multi_rank_runs = [(run, run.experiment) for run in runs if run.experiment is not None and run.world_size > 1]
    base = next((experiment for _, experiment in multi_rank_runs if is_plain(experiment)), None)
    if base is None:
        return []
    groups: dict[str, list[tuple[LabeledRun, Experiment]]] = {_key(base): []}
    for run, experiment in multi_rank_runs:
        if is_plain(experiment) and _key(experiment) != _key(base):
            continue  # other buckets or no overlap do not make it another method
        if experiment.layout == base.layout and not differences(base, experiment) and not run.is_ceiling:
            groups.setdefault(_key(experiment), []).append((run, experiment))
    names = traced.run_names([group[0][0] for group in groups.values()], links=False)
    methods = []
    for name, group in zip(names, groups.values(), strict=True):
        price = cost((experiment, run.data) for run, experiment in group)
        if price is not None:
            methods.append(_Method(name, [run for run, _ in group], price))
    return methods if methods and methods[0].runs[0] is groups[_key(base)][0][0] else []


def _key(experiment: Experiment) -> str:
    """Return what identifies a method, independent of the link."""
    return experiment.gradients.model_dump_json()


def finding(names: Sequence[str], crossings: Sequence[BreakEven]) -> str:
    """Return the headline: the rates above which plain averaging is faster."""
    pairs = sorted(zip(crossings, names, strict=True), key=lambda pair: (pair[0].mbit, pair[0].low))
    (first, low), (last, high) = pairs[0], pairs[-1]
    if len(pairs) > 3 and first.mbit > 0 and last.mbit < math.inf:
        return (
            f"{wording.PLAIN} is faster than all {len(pairs)} methods {_faster_range(last)} ({high}) "
            f"and slower than all below {wording.rate(first.mbit)} ({low})"
        )
    rates = ", ".join(f"than {name} {_faster_range(crossing)}" for crossing, name in pairs[:3])
    rest = f" (and {len(pairs) - 3} more methods)" if len(pairs) > 3 else ""
    return f"{wording.PLAIN} is faster {rates}{rest}"


def _faster_range(crossing: BreakEven) -> str:
    """Return the rates at which plain averaging is faster, in words."""
    if crossing.mbit == 0:
        return "at every rate"
    if crossing.mbit < math.inf:
        return f"above {wording.rate(crossing.mbit)}"
    return "at no rate" if crossing.low == math.inf else f"above {wording.rate(crossing.low)} at the earliest"


def _interval(crossing: BreakEven) -> str:
    """Return the 95 % interval of the break-even rate as text: `700 Mbit/s to 1.05 Gbit/s`."""
    if crossing.mbit == 0:
        return "–"
    high = "no limit" if crossing.high == math.inf else wording.rate(crossing.high)
    return high if crossing.low == math.inf else f"{wording.rate(crossing.low)} to {high}"


def _method_traces(
    index: int, method: _Method, rates: Any, crossing: BreakEven | None, no_limit_x: float
) -> list[dict[str, Any]]:
    """Return the line, the measured points and the break-even point of a method."""
    colour, dash, marker = (theme.INK, "solid", "circle") if crossing is None else theme.style(index - 1)
    suffix = "" if crossing is None else f": slower {_faster_range(crossing)}"
    group = {"legendgroup": str(index), "name": theme.safe(method.name)}
    points = method.points()
    traces: list[dict[str, Any]] = [
        group
        | {
            "type": "scatter",
            "mode": "lines",
            "name": theme.safe(f"{method.name}{suffix}", 100),
            "x": rates.astype(np.float32),
            "y": np.array([1000 * method.cost.seconds(rate) for rate in rates], dtype=np.float32),
            "line": {"color": colour, "dash": dash, "width": 3.5 if crossing is None else 2.2},
            "hovertemplate": "%{x:,.3~g} Mbit/s: %{y:,.3~g} ms by the formula<extra>%{fullData.name}</extra>",
        },
        group
        | {
            "type": "scatter",
            "mode": "markers",
            "showlegend": False,
            "x": [rate or no_limit_x for rate, _ in points],
            "y": [step for _, step in points],
            "marker": {"symbol": marker, "size": 10, "color": colour, "line": {"color": theme.PAPER, "width": 1}},
            "hovertemplate": "%{y:,.3~g} ms measured<extra>%{fullData.name}</extra>",
        },
    ]
    if crossing is not None and SLOWEST <= crossing.mbit <= FASTEST:
        traces.append(
            group
            | {
                "type": "scatter",
                "mode": "markers",
                "showlegend": False,
                "x": [crossing.mbit],
                "y": [1000 * method.cost.seconds(crossing.mbit)],
                "marker": {"symbol": "x-thin", "size": 13, "line": {"color": colour, "width": 3}},
                "hovertemplate": "break-even: %{x:,.3~g} Mbit/s<extra>%{fullData.name}</extra>",
            }
        )
    return traces


def _row(method: _Method, crossing: BreakEven | None) -> Row:
    measured = [
        f"{theme.number(step)} ({'no limit' if rate is None else wording.rate(rate)})" for rate, step in method.points()
    ]
    median = method.cost.steady.median
    return {
        "Run": method.name,
        "Without waiting (ms)": theme.number(None if median is None else 1000 * median),
        "On the link per step": traced.format_bytes(method.cost.bytes),
        "Measured steps (ms)": ", ".join(measured) or "–",
        "Plain averaging is faster": "–" if crossing is None else _faster_range(crossing),
        "95 % interval": "–" if crossing is None else _interval(crossing),
    }
