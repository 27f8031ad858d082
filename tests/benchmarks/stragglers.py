"""One rank made four times slower: what synchronous training loses, and what others keep.

"Could give": what as many copies that never talk reach with the same slow rank (launch.isolated), the ceiling of this
machine. With four ranks there are more ranks than cores on a small machine; a rank that sleeps leaves its core to the
others, for the ceiling as for the methods. So there is a series with two ranks too, and one with a larger batch, where
an update takes long enough that ranks which share cores get equal parts of them.
"""

from __future__ import annotations

import statistics
from typing import Any

from _common import arguments, finished, interleave, median_and_range, ratios, report

from labkit.experiment import Experiment
from labkit.experiment.recipes import recipe
from labkit.proofs.parity import check

FACTOR = 4.0
SERIES = {"4 ranks": (4, 128, 80), "4 ranks, large batch": (4, 512, 40), "2 ranks": (2, 256, 40)}
"""Ranks, global batch, updates; the last rank is slow."""
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


def experiment(series: str, case: str) -> Experiment:
    ranks, batch, steps = SERIES[series]
    base = recipe("vision-ddp").set(
        {
            "name": case,
            "layout": {"dp_replicate": ranks},
            "launch.slowdown": {str(ranks - 1): FACTOR},
            "training.global_batch": batch,
            "training.steps": steps,
            "training.evaluate_every": 0,
            "training.checkpoint_every": 0,
        }
    )
    return base.set(CASES[case])


def samples_per_second(series: str, case: str) -> float:
    return float(finished(experiment(series, case)).summary()["samples_per_second"])


def main() -> int:
    options = arguments(__doc__ or "", repeats=3)
    rows, claims, data = [], [], {}
    for series in SERIES:
        cases = {case: lambda series=series, case=case: samples_per_second(series, case) for case in CASES}
        figures = data[series] = interleave(cases, options.repeats)
        for case, values in figures.items():
            of = median_and_range(ratios(figures, case, "could give"))
            rows.append(
                (
                    f"{series}: {case}",
                    f"{statistics.median(values):5.0f} samples/s, of what the machine could give {of}",
                )
            )
        fallen = statistics.median(ratios(figures, "synchronous", "no rank slowed"))
        claims.append((f"{series}: synchronous, of the same without a slow rank", fallen, "<=", 0.5))
        for case in ("shares by speed", "parameter server", "gossip"):
            kept = statistics.median(ratios(figures, case, "could give"))
            claims.append((f"{series}: {case}, of what the machine could give", kept, ">=", KEPT))
    proof = check(experiment("4 ranks", "shares by speed"), 10, ("fp64",))
    rows.append(("shares by speed", proof["text"][0]))
    claims.append(("shares by speed: largest difference in loss", proof["max_loss_difference"], "<=", 1e-9))
    return report(f"One rank slowed {FACTOR:g} times", rows, claims, options, data | {"proof": proof})


if __name__ == "__main__":
    raise SystemExit(main())
