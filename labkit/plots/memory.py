"""What fills the memory of a rank: parameters, gradients, optimizer state and activations, beside the formula."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from labkit.experiment.memory import KINDS, STATES
from labkit.plots import theme, traced
from labkit.plots.picture import Picture
from labkit.plots.shown import LabeledRun, shown

TITLES = {
    "parameters": "Parameters",
    "gradients": "Gradients",
    "optimizer": "Optimizer state",
    "stash": "Stashed weights (peak)",
    "activations": "Activations (peak)",
}


def fullest(one: LabeledRun) -> int | None:
    """The rank that holds most; None where nothing was traced."""
    memory = one.data.memory
    return max(memory, key=lambda rank: sum(memory[rank].values())) if memory else None


def finding(held: list[tuple[str, dict[str, int], dict[str, int]]]) -> str:
    """Who needs how much; `held` has the name, the measured and the calculated bytes of each run's fullest rank."""
    states = [(name, sum(measured.get(kind, 0) for kind in STATES), measured) for name, measured, _ in held]
    formula = [sum(calculated.get(kind, 0) for kind in STATES) for *_, calculated in held]
    apart = max((abs(state / said - 1) for (_, state, _), said in zip(states, formula, strict=True) if said), default=0)
    near = f"the formula is met within {max(0.1, 100 * apart):.1f} %"
    if len(held) == 1:
        name, state, measured = states[0]
        beside = traced.size(measured.get("activations", 0))
        return f"{name}: a rank holds {traced.size(state)} of model state ({near}) and up to {beside} of activations"
    least, most = (pick(states, key=lambda one: one[1]) for pick in (min, max))
    if least[1] == most[1]:
        return f"Model state: {traced.size(most[1])} a rank in all {len(held)} runs; {near}"
    return (
        f"Model state per rank falls from {traced.size(most[1])} ({most[0]}) to {traced.size(least[1])} "
        f"({least[0]}); {near}"
    )


def memory(runs: Iterable[Any] | Any) -> Picture:
    """Stacked bars, one a run, for the rank that holds most; outlined beside each, what the formula says.

    Bytes were taken from the real tensors at the end of the traced update, before gradients are cleared.
    """
    many = [one for one in shown(runs) if one.data.memory]
    if not many:
        return traced.nothing("No memory to show: 0 runs have traced an update (training.trace_step)")
    ranks = [rank for one in many if (rank := fullest(one)) is not None]
    measured = [one.data.memory[rank] for one, rank in zip(many, ranks, strict=True)]
    formula = [one.data.formula[rank] for one, rank in zip(many, ranks, strict=True)]
    names = traced.names(many)
    labels = [theme.safe(name) for name in names]
    per, unit = traced.unit(max(sum(sizes.values()) for sizes in measured))
    sentence = finding(list(zip(names, measured, formula, strict=True)))
    traces = []
    below = [0.0] * len(many)
    kinds = [kind for kind in KINDS if kind != "stash" or any(kind in sizes for sizes in measured)]
    for index, kind in enumerate(kinds):
        values = [sizes.get(kind, 0) / per for sizes in measured]
        traces.append(
            traced.bars(
                index,
                TITLES[kind],
                values,
                y=labels,
                base=below,
                width=0.44,
                offset=-0.36,
                hovertemplate=f"%{{y}}: %{{x:.3~g}} {unit}<extra>{TITLES[kind]}</extra>",
            )
        )
        below = [base + value for base, value in zip(below, values, strict=True)]
    below = [0.0] * len(many)
    for kind in STATES:
        values = [sizes.get(kind, 0) / per for sizes in formula]
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": "Formula (without activations)",
                "legendgroup": "formula",
                "showlegend": kind == STATES[0],
                "x": values,
                "y": labels,
                "base": below,
                "width": 0.2,
                "offset": 0.12,
                "marker": {"color": "rgba(255,255,255,0)", "line": {"color": theme.INK, "width": 1.5}},
                "hovertemplate": f"%{{y}}: %{{x:.3~g}} {unit}<extra>{TITLES[kind]}, formula</extra>",
            }
        )
        below = [base + value for base, value in zip(below, values, strict=True)]
    layout = traced.layout(
        sentence,
        barmode="overlay",
        xaxis=theme.axis(f"Memory of the fullest rank ({unit})", rangemode="tozero"),
        yaxis=theme.axis("", type="category", autorange="reversed", ticks="", showgrid=False),
        height=180 + 64 * min(len(many), 24),
    )
    rows = [
        {"Run": name, "Rank": rank}
        | {TITLES[kind]: traced.size(sizes.get(kind, 0)) for kind in kinds}
        | {"Model state": traced.size(sum(sizes.get(kind, 0) for kind in STATES))}
        | {"Formula": traced.size(sum(said.get(kind, 0) for kind in STATES))}
        for name, rank, sizes, said in zip(names, ranks, measured, formula, strict=True)
    ]
    return Picture(traces, layout, summary=f"{sentence}.", rows=rows)
