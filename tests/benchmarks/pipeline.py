"""Two pipeline stages and eight microbatches: the bubble measured beside the schedule's own, cuts, and schedules.

The *uneven* chain has blocks that widen with the square of their place (_uneven_task.py). An equal number of blocks per
stage makes the second stage the slower one; the cost-balanced cut moves the border. *Schedules* are compared on an even
GPT, which is cut by cost too, because its head costs more than its embedding. One thread a rank, chunks of tens of
milliseconds, so that neither messages nor Python decide. The bubble is that of one traced update a run.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from _common import arguments, finished, interleave, median_and_range, ratios, report

from labkit.experiment import Experiment
from labkit.experiment.recipes import recipe
from labkit.launch import warm

STEPS = 12
BASE = recipe("language-ddp").set(
    {
        "workload.depth": 8,
        "workload.width": 256,
        "workload.context": 128,
        "training.steps": STEPS,
        "training.trace_step": STEPS // 2,
        "training.global_batch": 16,
        "training.evaluate_every": 0,
        "training.checkpoint_every": 0,
    }
)
UNEVEN = BASE.set(
    {
        "workload": {"name": "custom", "path": f"{Path(__file__).with_name('_uneven_task.py')}:make"},
        "training.global_batch": 1536,
    }
)
PIPE = {"pp": 2, "microbatches": 8}
CASES: dict[str, Experiment] = {
    "uneven, equal count": UNEVEN.set({"layout": {**PIPE, "schedule": "1f1b"}}),
    "uneven, balanced": UNEVEN.set({"layout": {**PIPE, "schedule": "1f1b", "balance": "cost"}}),
} | {
    schedule: BASE.set({"layout": {**PIPE, "schedule": schedule, "stages_per_rank": stages, "balance": "cost"}})
    for schedule, stages in (("naive", 1), ("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2))
}
summaries: dict[str, list[dict[str, Any]]] = {name: [] for name in CASES}
"""The summaries of each case."""


def step_seconds(name: str) -> float:
    run = finished(CASES[name])
    summary = run.summary()
    summaries[name].append(summary)
    return float(summary["step_seconds"]["median"])


def middle(name: str, *keys: str) -> float:
    """The median over the repeats of a number of the bubble."""
    return statistics.median(summary["bubble"][key] for summary in summaries[name] for key in keys)


def activations(name: str) -> float:
    return max(sizes["activations"] for sizes in summaries[name][-1]["memory"]["measured"]) / 2**20


def main() -> int:
    options = arguments(__doc__ or "")
    warm(wait=120)
    figures = interleave({name: lambda name=name: step_seconds(name) for name in CASES}, options.repeats)
    rows = []
    for name, values in figures.items():
        book = summaries[name][-1]["bubble"]["textbook"]
        rows.append(
            (
                name,
                f"{median_and_range([1000 * value for value in values])} ms/step, "
                f"bubble {100 * middle(name, 'measured'):.1f} % "
                f"(own {100 * middle(name, 'own'):.1f} %, even stages {100 * book:.1f} %), "
                f"activations {activations(name):.1f} MB",
            )
        )
    gain = ratios(figures, "uneven, equal count", "uneven, balanced")
    order = {
        "naive over gpipe, time": ratios(figures, "naive", "gpipe"),
        "1f1b over interleaved_1f1b, time": ratios(figures, "1f1b", "interleaved_1f1b"),
    }
    rows += [
        ("balanced cut is faster by", median_and_range(gain)),
        *((name, median_and_range(values)) for name, values in order.items()),
    ]
    claims = [
        (f"{name}: measured over own bubble, distance from 1", distance(name), "<=", 0.15)
        for name in ("uneven, equal count", "uneven, balanced")
    ]
    claims += [
        ("cost-balanced cut over equal count", statistics.median(gain), ">=", 1.25),
        ("naive over gpipe, time", statistics.median(order["naive over gpipe, time"]), ">=", 1.0),
        ("naive over gpipe, own bubble", middle("naive", "own") / middle("gpipe", "own"), ">=", 2.0),
        ("gpipe over 1f1b, activations", activations("gpipe") / activations("1f1b"), ">=", 2.0),
        ("1f1b over interleaved, own bubble", middle("1f1b", "own") / middle("interleaved_1f1b", "own"), ">=", 1.0),
    ]
    return report("Pipelines, 2 ranks, 8 microbatches", rows, claims, options, {"seconds": figures, "runs": summaries})


def distance(name: str) -> float:
    """Of the measured bubble from the schedule's own, relative, median over the repeats."""
    return statistics.median(
        abs(summary["bubble"]["measured"] / summary["bubble"]["own"] - 1) for summary in summaries[name]
    )


if __name__ == "__main__":
    raise SystemExit(main())
