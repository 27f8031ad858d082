"""Parity: proves that a layout computes what one process computes.

With the same seed, global batch and order of samples, k optimizer steps of the layout are compared with k steps of one
process: losses and global gradient norms step by step, then held-out metrics and buffers if both runs have them. In
float64 a correct layout agrees to 1e-9, and an incorrect one cannot hide behind rounding; in float32, in which networks
are usually trained, rounding errors grow over the steps, hence 1e-4.
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
from labkit.experiment.own_methods import class_name
from labkit.experiment.update_rule import update_rule
from labkit.launch.client import private_standby
from labkit.launch.rehearse import rehearse
from labkit.proofs.finish import run_to_completion
from labkit.proofs.likely_reason import likely_reason
from labkit.proofs.saved_buffers import buffer_difference
from labkit.runs.data import RunData
from labkit.runs.run import Run, RunFailed

TOLERANCE = {"fp64": 1e-9, "fp32": 1e-4}
STEPS = 20
HEAD_BYTES = 2**20
"""Bytes read from the start of a file of events, which contains the rehearsal."""


@dataclass(frozen=True)
class Parity:
    """The verdict for one precision.

    Differences are absolute for losses, relative above 1 for gradient norms and metrics.
    """

    precision: str
    parity: bool
    max_loss_difference: float
    max_gradient_norm_difference: float
    max_metric_difference: float | None
    """None if the runs were not evaluated."""
    tolerance: float
    steps: int
    first_step_beyond: int | None
    """The first optimizer step that differs by more than the tolerance."""
    run_id: str
    reference_run_id: str
    max_buffer_difference: float | None = None
    """For running means, counts and other tensors that are saved but not trained; None if nothing was saved."""
    buffer_beyond: str | None = None
    """Name of the buffer that differs most, if it differs by more than the tolerance."""

    def __str__(self) -> str:
        metrics_differ = self.max_metric_difference is not None and not self.max_metric_difference <= self.tolerance
        place = "in its held-out metrics" if metrics_differ else f"in {self.buffer_beyond}"
        if self.first_step_beyond:
            place = f"at step {self.first_step_beyond}"
        verdict = "equal to one process" if self.parity else f"DIFFERS from one process {place}"
        metric = "" if self.max_metric_difference is None else f", {self.max_metric_difference:.1e} in held-out metrics"
        if self.max_buffer_difference:
            metric += f", {self.max_buffer_difference:.1e} in buffers"
        return (
            f"{self.precision}: {verdict} over {self.steps} steps; largest difference {self.max_loss_difference:.1e} "
            f"in loss, {self.max_gradient_norm_difference:.1e} in gradient norm{metric} "
            f"(tolerance {self.tolerance:.0e})"
        )


def parity_config(experiment: Experiment, steps: int, precision: str) -> Experiment:
    """Return `experiment` as it is run for the comparison: short, in one precision, with gradient norms recorded.

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
    """Compare two finished runs step by step. RunFailed if one has another number of steps."""
    data, expected = run.data(), reference.data()
    if data.steps != steps or expected.steps != steps:
        raise RunFailed(f"{steps} steps were requested, but the runs have {data.steps} and {expected.steps}")
    tolerance = TOLERANCE[precision]
    with np.errstate(invalid="ignore"):  # a loss of NaN is read as infinite
        loss = np.abs(data.loss - expected.loss)
        norm = np.abs(data.grad_norm - expected.grad_norm) / np.maximum(1.0, np.abs(expected.grad_norm))
    # A NaN on either side is a difference, never agreement.
    beyond = ~((loss <= tolerance) & (norm <= tolerance))
    metric = _metric_difference(data, expected, precision)
    buffers = buffer_difference(run, reference)
    buffers_equal = buffers is None or buffers[0] <= tolerance
    return Parity(
        precision=precision,
        parity=bool(not beyond.any() and (metric is None or metric <= tolerance) and buffers_equal),
        max_loss_difference=float(np.max(loss)),
        max_gradient_norm_difference=float(np.max(norm)),
        max_metric_difference=metric,
        tolerance=tolerance,
        steps=steps,
        first_step_beyond=int(np.argmax(beyond)) + 1 if beyond.any() else None,
        run_id=run.id,
        reference_run_id=reference.id,
        max_buffer_difference=None if buffers is None else buffers[0],
        buffer_beyond=None if buffers_equal or buffers is None else buffers[1],
    )


def _metric_difference(data: RunData, expected: RunData, precision: str) -> float | None:
    """Return the largest difference of the held-out metrics; None without evaluations.

    In float32 only the losses count: rounding may change the prediction for a sample, which changes a count by one.
    """
    if not data.evaluations and not expected.evaluations:
        return None
    if [step for step, _, _ in data.evaluations] != [step for step, _, _ in expected.evaluations]:
        return float("inf")
    differences = [0.0]
    for (_, _, metrics), (_, _, expected_metrics) in zip(data.evaluations, expected.evaluations, strict=True):
        for name in metrics.keys() | expected_metrics.keys():
            if precision == "fp64" or name == "loss":
                a, b = metrics.get(name, float("nan")), expected_metrics.get(name, float("nan"))
                if a != a and b != b and name in metrics and name in expected_metrics:
                    continue  # NaN in both runs, e.g. an accuracy without a single target
                difference = abs(a - b) / max(1.0, abs(b))
                differences.append(difference if difference == difference else float("inf"))
    return max(differences)


_DIFFERENT_TASK = (
    "the two runs did not build the same task: weights or samples come from something that training.seed does not "
    "reach (a generator without a seed, the time, the order of a set)"
)


def _task_hash(run: Run) -> str | None:
    """Return the hash of the task that the first rank of a run built; None if it was not recorded."""
    try:
        *lines, _ = safe_files.read_piece(run.directory.events(0), 0, HEAD_BYTES).split(b"\n")
    except OSError:
        return None
    for line in lines:
        event = json.loads(line)
        if event.get("event") == "rehearsal":
            return str(event.get("built"))
    return None


def parity_not_applicable(experiment: Experiment) -> Problem | None:
    """Return why this experiment does not claim to compute what one process computes; None if it does."""
    compressor, _ = experiment.gradients.compression.load()
    if compressor.lossy:
        method = class_name(experiment.gradients.compression.method)
        reason = f"{method} changes gradients and claims no parity: compare its loss with that of a run without it"
        return Problem("gradients.compression.method", reason, "none")
    rule = update_rule(experiment)
    if not rule.is_synchronous:
        why = "lets replicas diverge or uses stale gradients and claims no parity"
        reason = f"{class_name(rule.key)} {why}: compare its loss with synchronous training"
        return Problem(rule.field, reason, rule.nearest_synchronous)
    return None


def provable(experiment: Experiment, steps: int, precisions: tuple[str, ...]) -> tuple[tuple[str, ...], list[str]]:
    """Return the precisions in which `experiment` can be proved, and one sentence for each of the others.

    Quantization-aware training, for example, requires float32. If only one precision was requested, it is returned.
    """
    problems = {precision: parity_config(experiment, steps, precision).problems() for precision in precisions}
    possible = tuple(precision for precision in precisions if not problems[precision])
    if not possible or len(precisions) == 1:
        return precisions, []
    return possible, [
        f"{precision} was left out; the proof holds for {' and '.join(possible)}: {problems[precision][0].reason}"
        for precision in precisions
        if precision not in possible
    ]


def _float32_alone(experiment: Experiment, steps: int, error: RunFailed) -> bool:
    """Return whether a model that raised `error` in one process in float64 can be trained there in float32."""
    in_float32 = parity_config(experiment, steps, "fp32")
    by_the_model = error.kind in ("task", "exception") and not in_float32.problems()
    return by_the_model and rehearse(one_process(in_float32)) is None


def _explanations(experiment: Experiment, verdicts: list[Parity], notes: list[str]) -> list[str]:
    """Return the warnings of the ranks, preceded by the most likely reason if a run differs."""
    failed = next((verdict for verdict in verdicts if not verdict.parity), None)
    if failed is None:
        return notes
    return [likely_reason(experiment, failed.first_step_beyond, failed.buffer_beyond, notes), *notes[1:]]


def check(
    experiment: Experiment,
    steps: int = STEPS,
    precisions: tuple[str, ...] = ("fp64", "fp32"),
    report: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Prove that the layout of `experiment` is equal to one process, in each precision.

    Return the JSON of `labkit check`: the figures of the first precision at the top level, those of all under
    `precisions`. `report` receives progress messages. Raise ExperimentError if the experiment cannot run or claims no
    parity, RunFailed if one of the runs fails.
    """
    problem = parity_not_applicable(experiment)
    if problem is not None:
        raise ExperimentError([problem])
    precisions, left_out = provable(experiment, steps, precisions)
    verdicts: list[Parity] = []
    reasons: list[str] = []

    def run(config: Experiment) -> Run:
        report(f"{config.title}: layout {config.layout}, {steps} steps")
        return run_to_completion(config)

    configs = {precision: parity_config(experiment, steps, precision) for precision in precisions}
    # Unseeded randomness in a user's task is equal in two forks of one process, so the reference needs another process.
    reference_standby = private_standby() if experiment.workload.name == "custom" else contextlib.nullcontext()
    with reference_standby:
        references: dict[str, Run] = {}
        for precision in precisions:
            try:
                name = f"parity reference {precision}: {experiment.title}"
                references[precision] = run(one_process(configs[precision], name))
            except RunFailed as error:
                if precision != "fp64" or not _float32_alone(experiment, steps, error):
                    raise
                if "fp32" not in precisions:
                    reason = f"the proof in float64 is impossible for this model, use --precision fp32: {error}"
                    raise RunFailed(reason, error.kind) from error
                left_out.append(
                    f"fp64 was left out; the proof holds for fp32: the model cannot be computed in float64: {error}"
                )
                del configs[precision]
        precisions = tuple(references)
    for precision, config in configs.items():
        layout = run(config.set({"name": f"parity {precision}: {experiment.title}"[:200]}))
        if precision == precisions[0]:
            starts = layout.data().rank_starts
            reasons = list(starts[0].get("warnings", [])) if starts else []
        verdicts.append(compare_losses(layout, references[precision], steps, precision))
        if not verdicts[-1].parity and _task_hash(layout) != _task_hash(references[precision]):
            reasons.append(_DIFFERENT_TASK)
    figures = asdict(verdicts[0])
    return figures | {
        "parity": all(verdict.parity for verdict in verdicts),
        "layout": str(experiment.resolve().layout),
        "world_size": experiment.resolve().layout.world_size,
        "global_batch": experiment.training.global_batch,
        "accumulation": experiment.gradients.accumulation,
        "workload": experiment.workload.name,
        "precisions": {verdict.precision: asdict(verdict) for verdict in verdicts},
        "text": [*(str(verdict) for verdict in verdicts), *_explanations(experiment, verdicts, reasons), *left_out],
    }
