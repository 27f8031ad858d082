"""Two ranks of the vision recipe against what this machine can give two processes that do not talk.

Speed-up over one rank, and the ceiling: two isolated copies with half of the batch each, at once. The claim is about
the ratio of the two: what data parallelism costs, not what the machine lacks.
"""

from __future__ import annotations

import statistics

from _common import arguments, finished, interleave, ratios, report, spread

from labkit.experiment import Experiment
from labkit.experiment.recipes import vision_ddp
from labkit.launch import warm

STEPS = 80


def step_seconds(experiment: Experiment) -> float:
    return float(finished(experiment).summary()["step_seconds"]["median"])


def main() -> int:
    options = arguments(__doc__ or "")
    warm(wait=120)
    two = vision_ddp().replace(f"training.steps={STEPS}", "training.evaluate_every=0", "training.checkpoint_every=0")
    one, copies = two.replace("layout.dp_replicate=1"), two.replace("launch.isolated=true")
    cases = {
        "1 rank": lambda: step_seconds(one),
        "2 ranks": lambda: step_seconds(two),
        "2 isolated copies": lambda: step_seconds(copies),
    }
    figures = interleave(cases, options.repeats)
    speedup, ceiling = ratios(figures, "1 rank", "2 ranks"), ratios(figures, "1 rank", "2 isolated copies")
    of_ceiling = ratios(figures, "2 isolated copies", "2 ranks")
    rows = [(name, spread([1000 * value for value in values]) + " ms/step") for name, values in figures.items()]
    rows += [("speed-up", spread(speedup)), ("ceiling", spread(ceiling)), ("speed-up / ceiling", spread(of_ceiling))]
    claims = [("2 ranks of the ceiling", statistics.median(of_ceiling), ">=", 0.95)]
    return report("Scaling, vision recipe", rows, claims, options, figures)


if __name__ == "__main__":
    raise SystemExit(main())
