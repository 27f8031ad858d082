"""What sparsity costs in accuracy: the vision recipe on one rank, several sparsities, methods and seeds.

Published order at equal sparsity: static < SET ≈ RigL <= gradual pruning (WRN-22-2 on CIFAR-10 at 80 %: static 91.2,
SET 92.7, RigL 92.6, gradual 93.2; the reproduction report of RigL). Whatever comes out here is shown beside it. And
2:4 by SR-STE: what part of its choice flips from one update to the next, at the beginning and at the end.
"""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
from _common import arguments, finished, report

from labkit.experiment import Experiment
from labkit.experiment.recipes import recipe
from labkit.runs import Run

METHODS = ("static", "set", "rigl", "gradual")
SPARSITIES = (0.8, 0.9, 0.95, 0.98)
SEEDS = (0, 1, 2)


def experiment(seed: int, **sparsity: Any) -> Experiment:
    return recipe("vision-ddp").set(
        {
            "layout": {},
            "sparsity": sparsity or {"method": "none"},
            "training.seed": seed,
            "training.checkpoint_every": 0,
            "training.trace_step": 0,
        }
    )


def accuracy(run: Run) -> float:
    return 100 * float(run.summary()["metrics"]["accuracy"])


def interval(values: list[float]) -> str:
    """Mean and the half width of the 95 % interval of Student's t for three values."""
    half = 4.303 * statistics.stdev(values) / np.sqrt(len(values)) if len(values) == 3 else float("nan")
    return f"{statistics.mean(values):5.1f} ± {half:.1f}"


def main() -> int:
    options = arguments(__doc__ or "", repeats=1)
    dense = [accuracy(finished(experiment(seed))) for seed in SEEDS]
    rows: list[tuple[str, str]] = [("dense", f"{interval(dense)} %")]
    figures: dict[str, Any] = {"dense": dense}
    for sparsity in SPARSITIES:
        for method in METHODS:
            accuracies = [accuracy(finished(experiment(seed, method=method, target=sparsity))) for seed in SEEDS]
            figures[f"{method} {sparsity:g}"] = accuracies
            rows.append((f"{sparsity:.0%} {method}", f"{interval(accuracies)} %"))
            print(f"  {rows[-1]}", flush=True)
    flips = []
    for seed in SEEDS:
        run = finished(experiment(seed, method="n_m"))
        changes = [np.mean([new for _, _, new in layers.values()]) for step, layers in run.data().sparsity]
        tenth = max(1, len(changes) // 10)
        flips.append((float(np.mean(changes[:tenth])), float(np.mean(changes[-tenth - 1 : -1]))))
        figures.setdefault("n_m 2:4", []).append(accuracy(run))
    rows.append(("2:4", f"{interval(figures['n_m 2:4'])} %"))
    before, after = (statistics.mean(values) for values in zip(*flips, strict=True))
    rows.append(("2:4, part of the choice that flips per update", f"{before:.3%} at first, {after:.3%} at the end"))
    claims = [
        (
            "gradual at 90 %: points below dense",
            statistics.mean(dense) - statistics.mean(figures["gradual 0.9"]),
            "<=",
            1.0,
        ),
        ("2:4: flips at the end, of those at first", after / before, "<=", 0.5),
    ]
    return report(f"Accuracy of sparse networks, {len(SEEDS)} seeds", rows, claims, options, figures | {"flips": flips})


if __name__ == "__main__":
    raise SystemExit(main())
