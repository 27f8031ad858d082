"""Memory of a rank: parameters, gradients, optimizer state and activations, measured and by the formula."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from labkit.experiment.memory import KINDS, STATES
from labkit.plots import theme, traced
from labkit.plots.picture import Picture
from labkit.plots.shown import LabeledRun, labeled_runs

TITLES = {
    "parameters": "Parameters",
    "gradients": "Gradients",
    "optimizer": "Optimizer state",
    "stash": "Stashed weights (peak)",
    "activations": "Activations (peak)",
}


def fullest(run: LabeledRun) -> int | None:
    """Return the rank with the most memory; None if no step was profiled."""
    memory = run.data.memory
    return max(memory, key=lambda rank: sum(memory[rank].values())) if memory else None


def finding(sizes: list[tuple[str, dict[str, int], dict[str, int]]]) -> str:
    """Return the headline; `sizes` has the name, the measured and the calculated bytes of each run's fullest rank."""
    states = [(name, sum(measured.get(kind, 0) for kind in STATES), measured) for name, measured, _ in sizes]
    formula = [sum(calculated.get(kind, 0) for kind in STATES) for *_, calculated in sizes]
    max_deviation = max(
        (
            abs(state / formula_bytes - 1)
            for (_, state, _), formula_bytes in zip(states, formula, strict=True)
            if formula_bytes
        ),
        default=0,
    )
    near = f"within {max(0.1, 100 * max_deviation):.1f} % of the formula"
    if len(sizes) == 1:
        name, state, measured = states[0]
        activations = traced.format_bytes(measured.get("activations", 0))
        held = traced.format_bytes(state)
        return f"{name}: a rank holds {held} of model state ({near}) and up to {activations} of activations"
    smallest, largest = (pick(states, key=lambda run: run[1]) for pick in (min, max))
    if smallest[1] == largest[1]:
        return f"Model state: {traced.format_bytes(largest[1])} a rank in all {len(sizes)} runs; {near}"
    return (
        f"Model state per rank falls from {traced.format_bytes(largest[1])} ({largest[0]}) "
        f"to {traced.format_bytes(smallest[1])} ({smallest[0]}); {near}"
    )


def memory(runs: Iterable[Any] | Any) -> Picture:
    """Plot the memory of the fullest rank as stacked bars, one per run, with the formula as an outline next to each.

    Bytes are those of the real tensors at the end of the traced step, before gradients are cleared.
    """
    labeled = [run for run in labeled_runs(runs) if run.data.memory]
    if not labeled:
        return traced.empty_picture("No memory to show: 0 runs have traced a step (training.trace_step)")
    ranks = [rank for run in labeled if (rank := fullest(run)) is not None]
    measured = [run.data.memory[rank] for run, rank in zip(labeled, ranks, strict=True)]
    formula = [run.data.formula[rank] for run, rank in zip(labeled, ranks, strict=True)]
    names = traced.run_names(labeled)
    labels = [theme.safe(name) for name in names]
    per, unit = traced.byte_unit(max(sum(sizes.values()) for sizes in measured))
    sentence = finding(list(zip(names, measured, formula, strict=True)))
    traces = []
    base_values = [0.0] * len(labeled)
    kinds = [kind for kind in KINDS if kind != "stash" or any(kind in sizes for sizes in measured)]
    for index, kind in enumerate(kinds):
        values = [sizes.get(kind, 0) / per for sizes in measured]
        traces.append(
            traced.bar_trace(
                index,
                TITLES[kind],
                values,
                y=labels,
                base=base_values,
                width=0.44,
                offset=-0.36,
                hovertemplate=f"%{{y}}: %{{x:.3~g}} {unit}<extra>{TITLES[kind]}</extra>",
            )
        )
        base_values = [base + value for base, value in zip(base_values, values, strict=True)]
    base_values = [0.0] * len(labeled)
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
                "base": base_values,
                "width": 0.2,
                "offset": 0.12,
                "marker": {"color": "rgba(255,255,255,0)", "line": {"color": theme.INK, "width": 1.5}},
                "hovertemplate": f"%{{y}}: %{{x:.3~g}} {unit}<extra>{TITLES[kind]}, formula</extra>",
            }
        )
        base_values = [base + value for base, value in zip(base_values, values, strict=True)]
    layout = traced.layout(
        sentence,
        barmode="overlay",
        xaxis=theme.axis(f"Memory of the fullest rank ({unit})", rangemode="tozero"),
        yaxis=theme.axis("", type="category", autorange="reversed", ticks="", showgrid=False),
        height=180 + 64 * min(len(labeled), 24),
    )
    rows = [
        {"Run": name, "Rank": rank}
        | {TITLES[kind]: traced.format_bytes(sizes.get(kind, 0)) for kind in kinds}
        | {"Model state": traced.format_bytes(sum(sizes.get(kind, 0) for kind in STATES))}
        | {"Formula": traced.format_bytes(sum(formula_sizes.get(kind, 0) for kind in STATES))}
        for name, rank, sizes, formula_sizes in zip(names, ranks, measured, formula, strict=True)
    ]
    return Picture(traces, layout, summary=f"{sentence}.", rows=rows)
