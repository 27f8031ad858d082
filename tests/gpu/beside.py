"""What the tests on GPUs measure, written down, and the table of it (`make gpu`).

    python -m tests.gpu.beside test-output/gpu.jsonl

Each line of the file is one comparison on one device: a way to train beside the plain one, runs of both in turn (A B A
B), the median time of a step after the warm-up and the loss over the held-out set.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FILE = "LABKIT_GPU_RESULTS"
"""Environment variable with the path of the file; without it the figures stay in pytest's own records."""
REPEATS = 2
WIDE = {
    "workload": {
        "name": "language",
        "width": 512,
        "depth": 4,
        "heads": 8,
        "context": 128,
        "max_characters": 500_000,
    },
    "training.steps": 60,
    "training.global_batch": 32,
    "training.evaluate_every": 60,
    "training.checkpoint_every": 0,
    "training.trace_step": 0,
    "optimizer.clip_norm": 1.0,
    "launch.device": "cuda",
    "launch.max_duration_s": 280,
}
"""Wide enough for products of matrices to take most of the time, short enough for a test."""


def beside(
    name: str,
    changes: Sequence[str],
    plain: Sequence[str],
    record: Callable[[str, object], None],
    base: dict[str, Any] = WIDE,
) -> tuple[Any, Any]:
    """Train with `changes` (as after --set) and with `plain`, in turn; write the comparison down. The last two runs."""
    from labkit.experiment import Experiment, Machine
    from labkit.launch import launch

    wanted = [Experiment().set(base).replace(*one) for one in (changes, plain)]
    ran: tuple[list[Any], list[Any]] = ([], [])
    for _ in range(REPEATS):
        for experiment, runs in zip(wanted, ran, strict=True):
            run = launch(experiment, baseline=None)
            run.result(300)
            runs.append(run)
    step_ms = [1000 * statistics.median(run.summary()["step_seconds"]["median"] for run in runs) for runs in ran]
    losses = [runs[-1].data().evaluations[-1][2]["loss"] for runs in ran]
    gpus = Machine.here().gpus
    found = {
        "what": name,
        "beside": ", ".join(plain) or "fp32",
        "device": gpus[0].name if gpus else "CPU",
        "step_ms": step_ms[0],
        "step_ms_beside": step_ms[1],
        "speedup": step_ms[1] / step_ms[0],
        "loss": losses[0],
        "loss_gap": losses[0] - losses[1],
    }
    for key, value in found.items():
        record(key, value)
    if path := os.environ.get(FILE):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
    return ran[0][-1], ran[1][-1]


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The comparisons, a line each."""
    head = f"{'':<28}{'beside':<30}{'step (ms)':>10}{'beside':>10}{'speed-up':>10}{'loss':>8}{'gap':>9}  device"
    rows = [
        f"{one['what']:<28}{one['beside']:<30}{one['step_ms']:>10.2f}{one['step_ms_beside']:>10.2f}"
        f"{one['speedup']:>9.2f}×{one['loss']:>8.3f}{one['loss_gap']:>+9.3f}  {one['device']}"
        for one in lines
    ]
    return "\n".join([head, *rows])


def main() -> int:
    path = Path(sys.argv[1])
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    print(table(lines) if lines else "Nothing was measured: the tests say what this machine lacks.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
