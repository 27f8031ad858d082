"""One of four ranks made four times slower: what synchronous training loses, and what others keep.

"Could give": what four copies that never talk reach with the same slow rank (launch.isolated), the ceiling of this
machine. There are more ranks than cores on a small machine; a rank that sleeps leaves its core to the others, for the
ceiling as for the methods.
"""

from __future__ import annotations

import statistics
from typing import Any

from _common import arguments, finished, interleave, ratios, report, spread

from labkit.experiment import Experiment
from labkit.experiment.recipes import recipe
from labkit.launch.parity import check

RANKS, SLOW, FACTOR, STEPS = 4, 3, 4.0, 80
CASES: dict[str, dict[str, Any]] = {
    "no rank slowed": {"launch.slowdown": {}},
    "could give": {"launch.isolated": True},
    "synchronous": {},
    "shares by speed": {"training.shares": "speed"},
    "parameter server": {"gradients.update": {"method": "parameter_server", "staleness": 16}},
    "gossip": {"gradients.update": {"method": "gossip"}},
    "backup worker": {"gradients.update": {"method": "parameter_server", "staleness": 0, "backup": 1}},
    "local SGD": {"gradients.update": {"method": "local_sgd"}},
}
KEPT = 0.8


def experiment(case: str) -> Experiment:
    base = recipe("vision-ddp").set(
        {
            "name": case,
            "layout": {"dp_replicate": RANKS},
            "launch.slowdown": {str(SLOW): FACTOR},
            "training.global_batch": 128,
            "training.steps": STEPS,
            "training.evaluate_every": 0,
            "training.checkpoint_every": 0,
        }
    )
    return base.set(CASES[case])


def samples_per_second(case: str) -> float:
    return float(finished(experiment(case)).summary()["samples_per_second"])


def main() -> int:
    options = arguments(__doc__ or "", repeats=3)
    cases = {case: lambda case=case: samples_per_second(case) for case in CASES}
    figures = interleave(cases, options.repeats)
    rows = [
        (
            case,
            f"{spread(values)} samples/s, of what the machine could give {spread(ratios(figures, case, 'could give'))}",
        )
        for case, values in figures.items()
    ]
    proof = check(experiment("shares by speed"), 10, ("fp64",))
    rows.append(("shares by speed", proof["text"][0]))
    kept = {case: statistics.median(ratios(figures, case, "could give")) for case in CASES}
    fallen = statistics.median(ratios(figures, "synchronous", "no rank slowed"))
    claims = [("synchronous, of the same without a slow rank", fallen, "<=", 0.5)]
    for case in ("shares by speed", "parameter server", "gossip"):
        claims.append((f"{case}, of what the machine could give", kept[case], ">=", KEPT))
    claims.append(("shares by speed: largest difference in loss", proof["max_loss_difference"], "<=", 1e-9))
    title = f"{RANKS} ranks, rank {SLOW} slowed {FACTOR:g} times"
    return report(title, rows, claims, options, figures | {"proof": proof})


if __name__ == "__main__":
    raise SystemExit(main())
