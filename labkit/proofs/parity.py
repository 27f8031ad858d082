"""Parity: does a layout compute what one process computes?

Same seed, same global batch, same order of samples: k updates of the layout beside k updates of one process, losses and
global gradient norms compared update by update, then held-out metrics and buffers where both have them. In float64 a
right layout agrees to 1e-9 and a wrong one cannot hide behind rounding; as trained, in float32, rounding itself grows
over the steps, hence 1e-4.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from labkit.experiment import Experiment, ExperimentError, Problem, safe_files
from labkit.experiment.one_process import one_process
from labkit.experiment.registry import registry
from labkit.launch.client import private_standby
from labkit.launch.rehearse import rehearse
from labkit.proofs.finish import finished
from labkit.proofs.likely_reason import likely_reason
from labkit.proofs.saved_buffers import buffer_difference
from labkit.runs.data import RunData
from labkit.runs.run import Run, RunFailed

TOLERANCE = {"fp64": 1e-9, "fp32": 1e-4}
STEPS = 20
BEGINNING_BYTES = 2**20
"""Of a file of events: the rehearsal is among the first."""


@dataclass(frozen=True)
class Parity:
    """The verdict for one number format.

    Differences are absolute for losses, relative above 1 for gradient norms and metrics.
    """

    precision: str
    parity: bool
    max_loss_difference: float
    max_gradient_norm_difference: float
    max_metric_difference: float | None
    """None where the runs were not evaluated."""
    tolerance: float
    steps: int
    first_step_beyond: int | None
    """The first update that differs by more than the tolerance."""
    run_id: str
    reference_run_id: str
    max_buffer_difference: float | None = None
    """Of running means, counts and whatever else is saved and not trained; None where nothing was saved."""
    buffer_beyond: str | None = None
    """Name of the buffer that differs most, if by more than the tolerance."""

    def __str__(self) -> str:
        metrics_differ = self.max_metric_difference is not None and not self.max_metric_difference <= self.tolerance
        where = "in its held-out metrics" if metrics_differ else f"in {self.buffer_beyond}"
        if self.first_step_beyond:
            where = f"at step {self.first_step_beyond}"
        verdict = "equal to one process" if self.parity else f"DIFFERS from one process {where}"
        metric = "" if self.max_metric_difference is None else f", {self.max_metric_difference:.1e} in held-out metrics"
        if self.max_buffer_difference:
            metric += f", {self.max_buffer_difference:.1e} in buffers"
        return (
            f"{self.precision}: {verdict} over {self.steps} steps; largest difference {self.max_loss_difference:.1e} "
            f"in loss, {self.max_gradient_norm_difference:.1e} in gradient norm{metric} "
            f"(tolerance {self.tolerance:.0e})"
        )


def proof(experiment: Experiment, steps: int, precision: str) -> Experiment:
    """`experiment` as it is run to be compared: short, in one number format, gradient norms written down.

    It is evaluated and saved once, at the end.
    """
    return experiment.set(
        {
            "training.steps": steps,
            "training.evaluate_every": steps,
            "training.checkpoint_every": steps,
            "training.gradient_norm": True,
            "optimizer.schedule": "constant",  # as in the first steps of a long run
            "quantization.training": precision,
        }
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
    metric = _metric_difference(one, other, precision)
    buffers = buffer_difference(run, reference)
    kept = buffers is None or buffers[0] <= tolerance
    return Parity(
        precision=precision,
        parity=bool(not beyond.any() and (metric is None or metric <= tolerance) and kept),
        max_loss_difference=float(np.max(loss)),
        max_gradient_norm_difference=float(np.max(norm)),
        max_metric_difference=metric,
        tolerance=tolerance,
        steps=steps,
        first_step_beyond=int(np.argmax(beyond)) + 1 if beyond.any() else None,
        run_id=run.id,
        reference_run_id=reference.id,
        max_buffer_difference=None if buffers is None else buffers[0],
        buffer_beyond=None if kept or buffers is None else buffers[1],
    )


def _metric_difference(one: RunData, other: RunData, precision: str) -> float | None:
    """Largest difference of the held-out metrics; None without evaluations.

    In float32 only that of the losses: rounding may carry a sample over the border, and a count then jumps by a whole.
    """
    if not one.evaluations and not other.evaluations:
        return None
    if [step for step, _, _ in one.evaluations] != [step for step, _, _ in other.evaluations]:
        return float("inf")
    differences = [0.0]
    for (_, _, mine), (_, _, theirs) in zip(one.evaluations, other.evaluations, strict=True):
        for name in mine.keys() | theirs.keys():
            if precision == "fp64" or name == "loss":
                a, b = mine.get(name, float("nan")), theirs.get(name, float("nan"))
                if a != a and b != b and name in mine and name in theirs:
                    continue  # in neither run a finite number, e.g. an accuracy without a single target
                difference = abs(a - b) / max(1.0, abs(b))
                differences.append(difference if difference == difference else float("inf"))
    return max(differences)


_OTHER_TASK = (
    "the two runs did not build the same task: weights or samples come from something that training.seed does not "
    "reach (a generator without a seed, the time, the order of a set)"
)


def _built(run: Run) -> str | None:
    """The hash of what the first rank of a run has built; None where it was not written down."""
    try:
        *lines, _ = safe_files.read_piece(run.directory.events(0), 0, BEGINNING_BYTES).split(b"\n")
    except OSError:
        return None
    for line in lines:
        event = json.loads(line)
        if event.get("event") == "rehearsal":
            return str(event.get("built"))
    return None


def claims_nothing(experiment: Experiment) -> Problem | None:
    """Why this experiment is not meant to compute what one process computes; None if it is."""
    method = experiment.gradients.compression.method
    if registry("gradients.compression")[method].load().lossy:
        reason = f"{method} changes gradients and claims no parity: compare its loss with that of a run without it"
        return Problem("gradients.compression.method", reason, "none")
    rule = experiment.gradients.update.method
    if rule != "synchronous":
        reason = (
            f"{rule} lets ranks go apart or comes late and claims no parity: compare its loss with synchronous training"
        )
        return Problem("gradients.update.method", reason, "synchronous")
    return None


def provable(experiment: Experiment, steps: int, precisions: tuple[str, ...]) -> tuple[tuple[str, ...], list[str]]:
    """The formats of several in which `experiment` can be proved, and one sentence for each of the others.

    Rounding for narrow numbers, for one, is felt in float32 only. One format that was asked for by itself stays.
    """
    problems = {precision: proof(experiment, steps, precision).problems() for precision in precisions}
    possible = tuple(precision for precision in precisions if not problems[precision])
    if not possible or len(precisions) == 1:
        return precisions, []
    return possible, [
        f"{precision} was left out, the proof holds for {' and '.join(possible)}: {problems[precision][0].reason}"
        for precision in precisions
        if precision not in possible
    ]


def _float32_alone(experiment: Experiment, steps: int, error: RunFailed) -> bool:
    """Return whether a model that raised `error` in one process in float64 can be trained there in float32."""
    in_float32 = proof(experiment, steps, "fp32")
    by_the_model = error.kind in ("task", "exception") and not in_float32.problems()
    return by_the_model and rehearse(one_process(in_float32)) is None


def _why(experiment: Experiment, verdicts: list[Parity], notes: list[str]) -> list[str]:
    """What the ranks have noted and, where something differs, the likeliest reason."""
    wrong = next((verdict for verdict in verdicts if not verdict.parity), None)
    if wrong is None:
        return notes
    return [likely_reason(experiment, wrong.first_step_beyond, wrong.buffer_beyond, notes), *notes[1:]]


def check(
    experiment: Experiment,
    steps: int = STEPS,
    precisions: tuple[str, ...] = ("fp64", "fp32"),
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Prove the layout of `experiment` against one process, in each number format.

    Returns the JSON of `labkit check`: the first format's figures at the top, all of them under `precisions`. `say` is
    told what is going on. Raises ExperimentError if the experiment cannot run or claims no parity, RunFailed if one of
    the runs fails.
    """
    reason = claims_nothing(experiment)
    if reason is not None:
        raise ExperimentError([reason])
    precisions, left_out = provable(experiment, steps, precisions)
    verdicts: list[Parity] = []
    reasons: list[str] = []

    def run(part: Experiment) -> Run:
        say(f"{part.title}: layout {part.layout}, {steps} steps")
        return finished(part)

    shorts = {precision: proof(experiment, steps, precision) for precision in precisions}
    # What a person's own task draws from nowhere that a seed reaches is the same in two forks of one process.
    apart = private_standby() if experiment.workload.name == "custom" else contextlib.nullcontext()
    with apart:
        references: dict[str, Run] = {}
        for precision in precisions:
            try:
                name = f"parity reference {precision}: {experiment.title}"
                references[precision] = run(one_process(shorts[precision], name))
            except RunFailed as error:
                if precision != "fp64" or not _float32_alone(experiment, steps, error):
                    raise
                if "fp32" not in precisions:
                    reason = f"float64 cannot be proved for this model, --precision fp32 can: {error}"
                    raise RunFailed(reason, error.kind) from error
                left_out.append(
                    f"fp64 was left out, the proof holds for fp32: the model cannot be computed in float64: {error}"
                )
                del shorts[precision]
        precisions = tuple(references)
    for precision, short in shorts.items():
        layout = run(short.set({"name": f"parity {precision}: {experiment.title}"[:200]}))
        if precision == precisions[0]:
            starts = layout.data().rank_starts
            reasons = list(starts[0].get("warnings", [])) if starts else []
        verdicts.append(compare_losses(layout, references[precision], steps, precision))
        if not verdicts[-1].parity and _built(layout) != _built(references[precision]):
            reasons.append(_OTHER_TASK)
    figures = asdict(verdicts[0])
    return figures | {
        "parity": all(verdict.parity for verdict in verdicts),
        "layout": str(experiment.resolve().layout),
        "world_size": experiment.resolve().layout.world_size,
        "global_batch": experiment.training.global_batch,
        "accumulation": experiment.gradients.accumulation,
        "workload": experiment.workload.name,
        "precisions": {verdict.precision: asdict(verdict) for verdict in verdicts},
        "text": [*(str(verdict) for verdict in verdicts), *_why(experiment, verdicts, reasons), *left_out],
    }
