"""On how fast a link each method stops paying: step time against the rate of the link, measured and by its formula."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from labkit.experiment import Experiment
from labkit.plots import theme, traced, wording
from labkit.plots.picture import Picture, Row
from labkit.plots.shown import LabeledRun, shown
from labkit.runs.break_even import BreakEven, Cost, cost
from labkit.runs.break_even import break_even as break_even_of
from labkit.runs.compare import differences
from labkit.runs.methods import is_plain

SLOWEST, FASTEST = 10.0, 100_000.0
"""Mbit/s: from a bad radio link to a data centre."""
NO_LIMIT = 4 * FASTEST
"""Where points stand that were measured on the machine's own link."""
WHY = "No break-even to show: it takes 1 run of plain averaging and 1 of another method on as many ranks, bytes counted"


@dataclass(frozen=True)
class _Method:
    """All runs of one method, and what an update of it costs."""

    name: str
    runs: list[LabeledRun]
    cost: Cost

    def points(self) -> list[tuple[float | None, float]]:
        """(rate of the link in Mbit/s or None, measured step in ms) of each run."""
        found = []
        for one in self.runs:
            network = one.experiment.launch.network if one.experiment else None
            step = traced.step_ms(one)
            if step is not None:
                found.append((None if network is None else network.rate_mbit, step))
        return found


def break_even(runs: Iterable[Any] | Any) -> Picture:
    """Lines: compute + bytes / rate, from what each method was measured to compute and to send; points: measured steps.

    All ranks share one link, as `launch.network` makes it. Runs of one method on several links count together. Methods
    in which ranks draw their work do not wait for a link and are left out.
    """
    methods = _methods(shown(runs))
    if len(methods) < 2:
        return traced.nothing(WHY)
    plain, others = methods[0], methods[1:]
    crossings = [break_even_of(plain.cost, one.cost) for one in others]
    sentence = wording.opening(finding([one.name for one in others], crossings))
    rates = np.geomspace(SLOWEST, FASTEST, 61)
    traces: list[dict[str, Any]] = []
    for index, one in enumerate(methods):
        crossing = None if not index else crossings[index - 1]
        beside = NO_LIMIT * 1.12 ** (index - len(methods) / 2)
        traces += _drawn(index, one, rates, crossing, beside)
    free = any(rate is None for one in methods for rate, _ in one.points())
    layout = traced.layout(
        sentence,
        xaxis=theme.axis(
            "Rate of the link that all ranks share",
            type="log",
            tickvals=[10, 100, 1000, 10_000, 100_000, *([NO_LIMIT] if free else [])],
            ticktext=["10 Mbit/s", "100 Mbit/s", "1 Gbit/s", "10 Gbit/s", "100 Gbit/s", "no limit"],
            range=[math.log10(SLOWEST), math.log10(1.6 * NO_LIMIT if free else 1.1 * FASTEST)],
        ),
        yaxis=theme.axis("Step (ms)", **_heights(traces)),
        legend={"y": -0.2, "yanchor": "top"},
        height=520,
    )
    layout["margin"] |= {"t": 92}
    rows = [_row(one, None if not index else crossings[index - 1]) for index, one in enumerate(methods)]
    return Picture(traces, layout, summary=f"{sentence}.", rows=rows)


def _heights(traces: Sequence[dict[str, Any]]) -> dict[str, Any]:
    values = np.concatenate([np.asarray(trace["y"], dtype=np.float64) for trace in traces])
    return theme.decades(0.7 * values.min(), 1.3 * values.max())


def applies(runs: Sequence[LabeledRun]) -> bool:
    """Is there a method to compare with plain averaging?"""
    return len(_methods(runs)) > 1


def _methods(runs: Sequence[LabeledRun]) -> list[_Method]:
    """Plain averaging first; then the others that differ from it in how gradients are combined and in nothing else."""
    known = [(one, one.experiment) for one in runs if one.experiment is not None and one.world_size > 1]
    base = next((experiment for _, experiment in known if is_plain(experiment)), None)
    if base is None:
        return []
    groups: dict[str, list[tuple[LabeledRun, Experiment]]] = {_key(base): []}
    for one, experiment in known:
        if is_plain(experiment) and _key(experiment) != _key(base):
            continue  # other buckets, no overlap: no method of its own
        if experiment.layout == base.layout and not differences(base, experiment) and not one.is_ceiling:
            groups.setdefault(_key(experiment), []).append((one, experiment))
    names = traced.names([group[0][0] for group in groups.values()], links=False)
    found = []
    for name, group in zip(names, groups.values(), strict=True):
        price = cost((experiment, one.data) for one, experiment in group)
        if price is not None:
            found.append(_Method(name, [one for one, _ in group], price))
    return found if found and found[0].runs[0] is groups[_key(base)][0][0] else []


def _key(experiment: Experiment) -> str:
    """What makes a method, whatever the link."""
    return experiment.gradients.model_dump_json()


def finding(names: Sequence[str], crossings: Sequence[BreakEven]) -> str:
    """Above which rate plain averaging is the faster one."""
    pairs = sorted(zip(crossings, names, strict=True), key=lambda pair: (pair[0].mbit, pair[0].low))
    (first, low), (last, high) = pairs[0], pairs[-1]
    if len(pairs) > 3 and first.mbit > 0 and last.mbit < math.inf:
        return (
            f"{wording.PLAIN} is faster than all {len(pairs)} methods {_where(last)} ({high}) "
            f"and slower than all below {wording.rate(first.mbit)} ({low})"
        )
    said = ", ".join(f"than {name} {_where(crossing)}" for crossing, name in pairs[:3])
    more = f" (and {len(pairs) - 3} more methods)" if len(pairs) > 3 else ""
    return f"{wording.PLAIN} is faster {said}{more}"


def _where(crossing: BreakEven) -> str:
    """At which rates plain averaging is faster."""
    if crossing.mbit == 0:
        return "at every rate"
    if crossing.mbit < math.inf:
        return f"above {wording.rate(crossing.mbit)}"
    return "at no rate" if crossing.low == math.inf else f"above {wording.rate(crossing.low)} at the earliest"


def _interval(crossing: BreakEven) -> str:
    """`700 Mbit/s to 1.05 Gbit/s`."""
    if crossing.mbit == 0:
        return "–"
    high = "no limit" if crossing.high == math.inf else wording.rate(crossing.high)
    return high if crossing.low == math.inf else f"{wording.rate(crossing.low)} to {high}"


def _drawn(index: int, one: _Method, rates: Any, crossing: BreakEven | None, no_limit: float) -> list[dict[str, Any]]:
    """The line, the measured points, and the place where the line crosses that of plain averaging."""
    colour, dash, marker = (theme.INK, "solid", "circle") if crossing is None else theme.style(index - 1)
    said = "" if crossing is None else f": slower {_where(crossing)}"
    group = {"legendgroup": str(index), "name": theme.safe(one.name)}
    points = one.points()
    found: list[dict[str, Any]] = [
        group
        | {
            "type": "scatter",
            "mode": "lines",
            "name": theme.safe(f"{one.name}{said}", 100),
            "x": rates.astype(np.float32),
            "y": np.array([1000 * one.cost.seconds(rate) for rate in rates], dtype=np.float32),
            "line": {"color": colour, "dash": dash, "width": 3.5 if crossing is None else 2.2},
            "hovertemplate": "%{x:,.3~g} Mbit/s: %{y:,.3~g} ms by the formula<extra>%{fullData.name}</extra>",
        },
        group
        | {
            "type": "scatter",
            "mode": "markers",
            "showlegend": False,
            "x": [rate or no_limit for rate, _ in points],
            "y": [step for _, step in points],
            "marker": {"symbol": marker, "size": 10, "color": colour, "line": {"color": theme.PAPER, "width": 1}},
            "hovertemplate": "%{y:,.3~g} ms measured<extra>%{fullData.name}</extra>",
        },
    ]
    if crossing is not None and SLOWEST <= crossing.mbit <= FASTEST:
        found.append(
            group
            | {
                "type": "scatter",
                "mode": "markers",
                "showlegend": False,
                "x": [crossing.mbit],
                "y": [1000 * one.cost.seconds(crossing.mbit)],
                "marker": {"symbol": "x-thin", "size": 13, "line": {"color": colour, "width": 3}},
                "hovertemplate": "break-even: %{x:,.3~g} Mbit/s<extra>%{fullData.name}</extra>",
            }
        )
    return found


def _row(one: _Method, crossing: BreakEven | None) -> Row:
    measured = [
        f"{theme.number(step)} ({'no limit' if rate is None else wording.rate(rate)})" for rate, step in one.points()
    ]
    middle = one.cost.steady.median
    return {
        "Run": one.name,
        "Without waiting (ms)": theme.number(None if middle is None else 1000 * middle),
        "On the link per step": traced.size(one.cost.bytes),
        "Measured steps (ms)": ", ".join(measured) or "–",
        "Plain averaging is faster": "–" if crossing is None else _where(crossing),
        "95 % interval": "–" if crossing is None else _interval(crossing),
    }
