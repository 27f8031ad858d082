"""What the rehearsal before step 1 costs: for every built-in workload, on the slower of two ranks.

A rank measures it itself, from the first look at the task to the moment when all have compared what they built; first
passes also wake what the first step would wake otherwise (kernels, threads of the backward pass). Nothing of it is left
in a step: numbers of a step are seeded as before.
"""

from __future__ import annotations

import json
import statistics
import time

from _common import arguments, finished, interleave, median_and_range, report

from labkit.experiment import Experiment
from labkit.experiment.recipes import RECIPES
from labkit.launch import warm
from labkit.proofs.cases import FAMILIES
from labkit.workloads.seed import seed_generators

CHANGES = {
    "layout": {"dp_replicate": 2},
    "training.steps": 2,
    "training.epochs": None,
    "training.evaluate_every": 0,
    "training.checkpoint_every": 0,
    "training.trace_step": 0,
}
SEEDINGS = 10_000
FOREIGN = ("small llama",)
"""Of another library's models nothing is known: they are tried as a person's own, which takes longer. No claim."""


def seconds(experiment: Experiment) -> float:
    """How long the slower rank rehearsed (s)."""
    run = finished(experiment)
    lines = [line for rank in range(2) for line in run.directory.events(rank).read_text(encoding="utf-8").splitlines()]
    return max(event["seconds"] for event in map(json.loads, lines) if event["event"] == "rehearsal")


def seeding() -> float:
    """How long it takes to seed torch, numpy and `random` for a step (s)."""
    begun = time.perf_counter()
    for step in range(SEEDINGS):
        seed_generators(step)
    return (time.perf_counter() - begun) / SEEDINGS


def main() -> int:
    options = arguments(__doc__ or "")
    warm(120)
    recipes = {name: make() for name, make in RECIPES.items()}
    families = {f"small {name}": Experiment().set({"workload": each.workload}) for name, each in FAMILIES.items()}
    experiments = {name: each.set(CHANGES) for name, each in (recipes | families).items()}
    cases = {name: (lambda each=each: seconds(each)) for name, each in experiments.items()}  # type: ignore[misc]
    figures = interleave(cases, options.repeats)
    rows = [(name, median_and_range([1000 * value for value in values]) + " ms") for name, values in figures.items()]
    per_step = seeding()
    rows.append(("seeding a step", f"{1e6 * per_step:.1f} µs"))
    own = {name: values for name, values in figures.items() if name not in FOREIGN}
    claims = [(f"{name} (s)", statistics.median(values), "<=", 0.05) for name, values in own.items()]
    claims.append(("seeding a step (s)", per_step, "<=", 2e-5))
    return report("Rehearsal before step 1, 2 ranks", rows, claims, options, figures | {"seeding": [per_step]})


if __name__ == "__main__":
    raise SystemExit(main())
