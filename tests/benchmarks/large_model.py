"""A GPT with 6 GB of float32 state (weights, gradients, two moments) on four ranks that each have a part of it.

No rank may ever hold the whole: not while the model is built, tried, cut and trained, and not while it is saved. Claim:
the peak of the resident memory of every rank stays under 0.4 of the state. The first loss proves that all layouts begin
with the same weights. Bytes do not depend on the speed of the machine, so one run of each is enough.
"""

from __future__ import annotations

from typing import Any

from _common import arguments, finished, report

from labkit.experiment.recipes import recipe
from labkit.launch import warm

BASE = recipe("language-ddp").set(
    {
        "workload.depth": 30,
        "workload.width": 1024,
        "workload.heads": 16,
        "workload.context": 32,
        "training.steps": 2,
        "training.global_batch": 4,
        "training.evaluate_every": 0,
        "launch.device": "cpu",
        "launch.timeout_s": 300,
        "launch.max_duration_s": 1200,
    }
)
LAYOUTS: dict[str, dict[str, Any]] = {"shard4": {"dp_shard": 4}, "pp4": {"pp": 4, "microbatches": 4}}
STATES = 4
"""Numbers of four bytes for each parameter: the weight, its gradient and two moments."""
GB = 1e9


def main() -> int:
    options = arguments(__doc__ or "", repeats=1)
    warm(wait=120)
    rows, claims, losses, peaks = [], [], {}, {}
    for name, layout in LAYOUTS.items():
        run = finished(BASE.set({"layout": layout}))
        start = run.data().rank_starts[0]
        state = 4 * STATES * start["parameters"]
        peaks[name] = run.summary()["peak_memory_bytes"]
        losses[name] = float(run.data().loss[0])
        rows.append((name, f"{max(peaks[name]) / GB:.2f} GB at most a rank, of {state / GB:.2f} GB of state"))
        claims.append((f"{name}: peak memory of a rank over the whole state", max(peaks[name]) / state, "<=", 0.4))
    difference = abs(losses["pp4"] / losses["shard4"] - 1)
    claims.append(("relative difference of the first loss between the layouts", difference, "<=", 1e-5))
    return report("A model that no rank holds", rows, claims, options, {"peaks": peaks, "losses": losses})


if __name__ == "__main__":
    raise SystemExit(main())
