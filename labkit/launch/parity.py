"""Parity: does a layout compute what one process computes?

Same seed, same global batch, same order of samples: k updates of the layout beside k updates of one process, losses and
global gradient norms compared update by update. In float64 a right layout agrees to 1e-9 and a wrong one cannot hide
behind rounding; as trained, in float32, rounding itself grows over the steps, hence 1e-4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from labkit.experiment import Experiment
from labkit.experiment.one_process import one_process
from labkit.launch.client import launch
from labkit.runs.run import Run, RunFailed

TOLERANCE = {"fp64": 1e-9, "fp32": 1e-4}
STEPS = 20


@dataclass(frozen=True)
class Parity:
    """The verdict for one number format. Differences are absolute for losses, relative above 1 for gradient norms."""

    precision: str
    parity: bool
    max_loss_difference: float
    max_gradient_norm_difference: float
    tolerance: float
    steps: int
    first_step_beyond: int | None
    """The first update that differs by more than the tolerance."""
    run_id: str
    reference_run_id: str

    def __str__(self) -> str:
        verdict = (
            "equal to one process" if self.parity else f"DIFFERS from one process at step {self.first_step_beyond}"
        )
        return (
            f"{self.precision}: {verdict} over {self.steps} steps; largest difference {self.max_loss_difference:.1e} "
            f"in loss, {self.max_gradient_norm_difference:.1e} in gradient norm (tolerance {self.tolerance:.0e})"
        )


def compare_losses(run: Run, reference: Run, steps: int, precision: str) -> Parity:
    """Compare two finished runs update by update."""
    one, other = run.data(), reference.data()
    if one.steps != steps or other.steps != steps:
        raise RunFailed(f"{steps} steps were asked for, the runs have {one.steps} and {other.steps}")
    tolerance = TOLERANCE[precision]
    with np.errstate(invalid="ignore"):  # a loss that is no number is read as infinite
        loss = np.abs(one.loss - other.loss)
        norm = np.abs(one.grad_norm - other.grad_norm) / np.maximum(1.0, np.abs(other.grad_norm))
    # A NaN on either side is a difference, never agreement.
    beyond = ~((loss <= tolerance) & (norm <= tolerance))
    return Parity(
        precision=precision,
        parity=not beyond.any(),
        max_loss_difference=float(np.max(loss)),
        max_gradient_norm_difference=float(np.max(norm)),
        tolerance=tolerance,
        steps=steps,
        first_step_beyond=int(np.argmax(beyond)) + 1 if beyond.any() else None,
        run_id=run.id,
        reference_run_id=reference.id,
    )


def check(
    experiment: Experiment,
    steps: int = STEPS,
    precisions: tuple[str, ...] = ("fp64", "fp32"),
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Prove the layout of `experiment` against one process, in each number format.

    Returns the JSON of `labkit check`: the first format's figures at the top, all of them under `precisions`. `say` is
    told what is going on. Raises ExperimentError if the experiment cannot run, RunFailed if one of the runs fails.
    """
    verdicts: list[Parity] = []
    reasons: list[str] = []
    for precision in precisions:
        proof = experiment.set(
            {
                "training.steps": steps,
                "training.evaluate_every": 0,
                "training.checkpoint_every": 0,
                "training.gradient_norm": True,
                "optimizer.schedule": "constant",  # as in the first steps of a long run
                "quantization.training": precision,
            }
        )
        alone = one_process(proof, f"parity reference {precision}: {experiment.title}")
        runs = []
        for part in (alone, proof.set({"name": f"parity {precision}: {experiment.title}"[:200]})):
            say(f"{part.title}: layout {part.layout}, {steps} steps")
            run = launch(part, baseline=None)
            try:
                run.result()
            except KeyboardInterrupt:
                run.request_stop(0.0)
                raise
            runs.append(run)
        if precision == precisions[0]:
            starts = runs[1].data().rank_starts
            reasons = list(starts[0].get("warnings", [])) if starts else []
        verdicts.append(compare_losses(runs[1], runs[0], steps, precision))
    figures = asdict(verdicts[0])
    return figures | {
        "parity": all(verdict.parity for verdict in verdicts),
        "layout": str(experiment.resolve().layout),
        "world_size": experiment.resolve().layout.world_size,
        "global_batch": experiment.training.global_batch,
        "accumulation": experiment.gradients.accumulation,
        "workload": experiment.workload.name,
        "precisions": {verdict.precision: asdict(verdict) for verdict in verdicts},
        "text": [*(str(verdict) for verdict in verdicts), *reasons],
    }
