"""What labkit costs per step under four layouts: beside a hand-written torch script that does the same.

FSDP2 and tensor parallelism on 2 ranks, a 1F1B pipeline of 2 ranks and 4 microbatches, FSDP2 × tensor parallelism on 4
ranks. Same model, data, order, batch and optimizer, one thread a rank, medians of the steps after the warm-up; that
both do the same is seen in the losses of the first steps.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from _common import arguments, finished, interleave, median_and_range, ratios, report
from _layouts_by_hand import BATCH, COMPARED, LR, MICROBATCHES, RANKS, SEED, WEIGHT_DECAY, WORKLOAD

from labkit.experiment import Experiment
from labkit.launch import warm

STEPS, WARMUP = 60, 12
LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp": {"dp_shard": 2},
    "tp": {"tp": 2},
    "pp": {"pp": 2, "schedule": "1f1b", "microbatches": MICROBATCHES},
    "2d": {"dp_shard": 2, "tp": 2},
}
SAME = 1e-4
"""Largest difference of the first losses."""
TRIED = 600.0

losses: dict[str, list[float]] = {}
"""Of the first steps, by case."""


def experiment(layout: str) -> Experiment:
    return Experiment().set(
        {
            "workload": {"name": "language"} | WORKLOAD,
            "layout": LAYOUTS[layout],
            "training.steps": STEPS,
            "training.global_batch": BATCH,
            "training.seed": SEED,
            "training.evaluate_every": 0,
            "training.checkpoint_every": 0,
            "optimizer.lr": LR,
            "optimizer.weight_decay": WEIGHT_DECAY,
            "optimizer.schedule": "constant",
            "launch.device": "cpu",
        }
    )


def with_labkit(layout: str) -> float:
    """Median step of rank 0 (s)."""
    data = finished(experiment(layout)).data()
    losses[f"labkit {layout}"] = data.loss[:COMPARED].tolist()
    return statistics.median(map(float, data.seconds[0][WARMUP:]))


def by_hand(layout: str) -> float:
    """Median step of rank 0 (s)."""
    script = str(Path(__file__).with_name("_layouts_by_hand.py"))
    with tempfile.TemporaryDirectory() as folder:
        given = [str(Path(folder, "store")), str(STEPS), str(Path(folder, "result"))]
        ranks = [
            subprocess.Popen(
                [sys.executable, script, layout, str(rank), *given],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(RANKS[layout])
        ]
        errors = [rank.communicate(timeout=TRIED)[1] for rank in ranks]
        if any(rank.returncode for rank in ranks):
            raise RuntimeError("the hand-written loop failed:\n" + "\n".join(errors))
        measured = json.loads(Path(folder, "result").read_text())
    losses[f"{layout} by hand"] = measured["losses"]
    return statistics.median(measured["seconds"][WARMUP:])


def main() -> int:
    options = arguments(__doc__ or "")
    warm(wait=120)
    cases = {}
    for layout in LAYOUTS:
        cases[f"{layout} by hand"] = lambda layout=layout: by_hand(layout)
        cases[f"labkit {layout}"] = lambda layout=layout: with_labkit(layout)
    figures = interleave(cases, options.repeats)
    rows = [
        (name, median_and_range([1000 * value for value in values]) + " ms/step") for name, values in figures.items()
    ]
    claims = []
    for layout in LAYOUTS:
        slowdowns = ratios(figures, f"labkit {layout}", f"{layout} by hand")
        rows.append((f"{layout}: labkit / by hand", median_and_range(slowdowns)))
        claims.append((f"{layout}: labkit step over hand-written step", statistics.median(slowdowns), "<=", 1.03))
        difference = float(np.abs(np.subtract(losses[f"labkit {layout}"], losses[f"{layout} by hand"])).max())
        claims.append((f"{layout}: difference of the first {COMPARED} losses", difference, "<=", SAME))
    return report("Layouts, GPT of 4 layers, one thread a rank", rows, claims, options, figures | {"losses": losses})


if __name__ == "__main__":
    raise SystemExit(main())
