"""Two ranks of the vision recipe against what this machine can give two processes that do not talk.

Speed-up over one rank, and the ceiling: two isolated copies with half of the batch each, at once. The claim is about
the ratio of the two: what data parallelism costs, not what the machine lacks.

Ranks wait for the slower one in every step, copies never do. So the machine's own unrest costs a synchronous method
something even if the exchange were free. It is estimated from the copies: the slower of two steps over their mean.
"""

from __future__ import annotations

import statistics

import numpy as np
from _common import arguments, finished, interleave, median_and_range, ratios, report

from labkit.experiment import Experiment
from labkit.experiment.recipes import vision_ddp
from labkit.launch import warm

STEPS, WARMUP = 80, 8


unrest: list[float] = []
"""Of each run of the copies: median of the slower of two steps ÷ median of their mean."""


def step_seconds(experiment: Experiment) -> float:
    return float(finished(experiment).summary()["step_seconds"]["median"])


def copies_step_seconds(experiment: Experiment) -> float:
    """As `step_seconds`, and notes what it would cost to wait for the slower copy in every step."""
    run = finished(experiment)
    first, second = (seconds[WARMUP:] for seconds in run.data().seconds)
    unrest.append(float(np.median(np.maximum(first, second)) / np.median((first + second) / 2)))
    return float(run.summary()["step_seconds"]["median"])


def main() -> int:
    options = arguments(__doc__ or "")
    warm(wait=120)
    two = vision_ddp().replace(f"training.steps={STEPS}", "training.evaluate_every=0", "training.checkpoint_every=0")
    single, copies = two.replace("layout.dp_replicate=1"), two.replace("launch.isolated=true")
    cases = {
        "1 rank": lambda: step_seconds(single),
        "2 ranks": lambda: step_seconds(two),
        "2 isolated copies": lambda: copies_step_seconds(copies),
    }
    figures = interleave(cases, options.repeats)
    speedup, ceiling = ratios(figures, "1 rank", "2 ranks"), ratios(figures, "1 rank", "2 isolated copies")
    of_ceiling = ratios(figures, "2 isolated copies", "2 ranks")
    rows = [
        (name, median_and_range([1000 * value for value in values]) + " ms/step") for name, values in figures.items()
    ]
    rows += [
        ("speed-up", median_and_range(speedup)),
        ("ceiling", median_and_range(ceiling)),
        ("speed-up / ceiling", median_and_range(of_ceiling)),
    ]
    rows.append(("waiting for the slower copy alone would cost", median_and_range(unrest)))
    claims = [("2 ranks of the ceiling", statistics.median(of_ceiling), ">=", 0.95)]
    return report("Scaling, vision recipe", rows, claims, options, figures | {"unrest": unrest})


if __name__ == "__main__":
    raise SystemExit(main())
