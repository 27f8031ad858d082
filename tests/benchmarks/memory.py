"""What a rank holds, measured on its tensors, beside the formulas of ZeRO (Rajbhandari et al. 2020), and what
activation checkpointing saves.

A GPT of 1.6 million parameters under Adam, stages 0 (replicas) to 3 on 1, 2 and 4 ranks. Bytes do not depend on the
speed of the machine, so one run of each is enough.
"""

from __future__ import annotations

from typing import Any

from _common import arguments, finished, report

from labkit.experiment import Experiment
from labkit.experiment.memory import STATES
from labkit.experiment.recipes import recipe
from labkit.launch import warm

BASE = recipe("language-ddp").set(
    {
        "workload.depth": 8,
        "workload.width": 128,
        "workload.context": 64,
        "training.steps": 4,
        "training.global_batch": 16,
        "training.evaluate_every": 0,
        "training.checkpoint_every": 0,
    }
)
LAYOUTS: dict[str, dict[str, Any]] = {"1 rank": {}} | {
    f"stage {stage}, {ranks} ranks": {"dp_shard": ranks, "zero_stage": stage} if stage else {"dp_replicate": ranks}
    for ranks in (2, 4)
    for stage in range(4)
}
CHECKPOINTING = ("none", "selective", "full")
MB = 2**20


def traced(experiment: Experiment) -> dict[str, Any]:
    memory: dict[str, Any] = finished(experiment).summary()["memory"]
    return memory


def relative_error(memory: dict[str, Any]) -> float:
    """Return the largest relative difference between measurement and formula, over ranks and kinds of state."""
    return max(
        abs(measured[kind] / formula[kind] - 1)
        for measured, formula in zip(memory["measured"], memory["formula"], strict=True)
        for kind in STATES
    )


def activations(memory: dict[str, Any]) -> float:
    return max(float(measured["activations"]) for measured in memory["measured"])


def main() -> int:
    options = arguments(__doc__ or "", repeats=1)
    warm(wait=120)
    memory_by_layout = {name: traced(BASE.set({"layout": layout})) for name, layout in LAYOUTS.items()}
    rows = []
    for name, memory in memory_by_layout.items():
        fullest = max(memory["measured"], key=lambda sizes: sum(sizes[kind] for kind in STATES))
        kinds = ", ".join(f"{kind} {fullest[kind] / MB:.2f}" for kind in STATES)
        state = sum(fullest[kind] for kind in STATES) / MB
        rows.append((name, f"{state:6.2f} MB a rank ({kinds}), {100 * relative_error(memory):.2f} % from the formula"))
    kept = {
        which: activations(traced(BASE.set({"layout": {"dp_shard": 2, "activation_checkpointing": which}})))
        for which in CHECKPOINTING
    }
    for which, size in kept.items():
        of_all = f"{100 * size / kept['none']:.0f} % of none"
        rows.append((f"checkpointing {which}, stage 3, 2 ranks", f"{size / MB:6.2f} MB of activations ({of_all})"))
    claims = [("largest distance from the formula", max(map(relative_error, memory_by_layout.values())), "<=", 0.03)]
    claims.append(("selective checkpointing keeps of the activations", kept["selective"] / kept["none"], "<=", 0.8))
    claims.append(("full checkpointing keeps of the activations", kept["full"] / kept["none"], "<=", 0.4))
    return report(
        "Memory per rank, GPT with Adam", rows, claims, options, {"state": memory_by_layout, "activations": kept}
    )


if __name__ == "__main__":
    raise SystemExit(main())
