"""Do two states of labkit compute the same? The losses of fixed runs, compared to the last bit.

For changes that must move no number, such as renaming or moving code: record the losses before, compare them after.
The runs cover every axis, two compressors, two update rules, one sparsity method and one number format; all but the
last are computed in float64.

    python tests/benchmarks/same_losses.py --record losses.json
    python tests/benchmarks/same_losses.py --compare losses.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from _common import finished

from labkit.experiment import Experiment
from labkit.launch import warm
from labkit.runs.data import RunData

GPT = {"name": "language", "width": 32, "depth": 2, "heads": 4, "context": 32, "max_characters": 20_000}
COMMON = {
    "training.steps": 6,
    "training.epochs": None,
    "training.global_batch": 8,
    "training.evaluate_every": 3,
    "training.checkpoint_every": 0,
    "training.seed": 7,
    "optimizer.lr": 3e-3,
    "quantization.training": "fp64",
    "launch.device": "cpu",
}
RUNS: dict[str, dict[str, Any]] = {
    "zero 1, vision": {"workload": {"name": "vision"}, "layout.dp_shard": 2, "layout.zero_stage": 1},
    "zero 3 and tp": {"workload": GPT, "layout.dp_shard": 2, "layout.tp": 2},
    "pp, 1f1b": {"workload": GPT, "layout.pp": 2, "layout.schedule": "1f1b", "layout.microbatches": 4},
    "cp": {"workload": GPT, "layout.cp": 2},
    "ep and dp": {"workload": {**GPT, "experts": 4}, "layout.ep": 2, "layout.dp_replicate": 2},
    "topk": {"workload": GPT, "layout.dp_replicate": 2, "gradients.compression.method": "topk"},
    "powersgd, driving": {
        "workload": {"name": "driving"},
        "layout.dp_replicate": 2,
        "gradients.compression.method": "powersgd",
    },
    "diloco": {"workload": GPT, "layout.dp_replicate": 2, "gradients.update.method": "diloco"},
    "local sgd": {"workload": GPT, "layout.dp_replicate": 2, "gradients.update.method": "local_sgd"},
    "rigl": {"workload": GPT, "layout.dp_replicate": 2, "sparsity.method": "rigl", "sparsity.target": 0.5},
    "int8": {
        "workload": GPT,
        "layout.dp_replicate": 2,
        "quantization.training": "int8",
    },
}


def losses(changes: dict[str, Any]) -> dict[str, list[float]]:
    """The training loss of each step and the held-out loss of each evaluation of one run."""
    data = RunData(finished(Experiment().set({**COMMON, **changes})).directory)
    data.refresh()
    return {
        "train": [float(loss) for loss in data.loss],
        "test": [metrics["loss"] for _, _, metrics in data.evaluations],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, metavar="FILE")
    parser.add_argument("--compare", type=Path, metavar="FILE")
    options = parser.parse_args()
    if (options.record is None) == (options.compare is None):
        parser.error("give either --record FILE or --compare FILE")
    warm(120)
    now = {name: losses(changes) for name, changes in RUNS.items()}
    if options.record is not None:
        options.record.write_text(json.dumps(now, indent=1), encoding="utf-8")
        print(f"{len(now)} runs recorded in {options.record}")
        return 0
    before = json.loads(options.compare.read_text(encoding="utf-8"))
    for name, values in now.items():
        print(f"  {'same   ' if before.get(name) == values else 'DIFFERS'}  {name}")
    return 0 if before == now else 1


if __name__ == "__main__":
    raise SystemExit(main())
