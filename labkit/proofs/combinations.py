"""Combinations of methods: layout × sparsity × precision × compression × update rule, every pair of them.

Methods that change the training cannot be proven equal to one process. But each combination must learn, and each of its
methods must show evidence that it was active; or a rule refuses it. The rows are a covering array, like those of the
parity matrix: methods come from the registries, so that a new one is included automatically.
"""

from __future__ import annotations

import functools
import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from labkit.experiment import Experiment, Problem, safe_files
from labkit.experiment.layout import Layout
from labkit.experiment.registry import registry
from labkit.experiment.rules import CHOICES
from labkit.experiment.schedules import SCHEDULES
from labkit.experiment.sections import AUTO
from labkit.experiment.update_rule import update_rule
from labkit.proofs.cases import is_noop, violations
from labkit.proofs.covering import CoveringArray, Row, greedy_cover
from labkit.proofs.finish import run_to_completion
from labkit.proofs.matrix import cell, provenance, refusals_by_reason
from labkit.runs.run import Run, RunFailed

OUTCOMES = ("learns", "refused", "OFF", "HARDLY", "FAILED")
GOOD = ("learns", "refused")
STEPS = 64
MIN_LOSS_REDUCTION = 0.5
"""Minimum loss reduction of a combination, as a fraction of that of plain training."""
TARGET = 0.5
"""Fraction of the weights that become zero."""
LAYOUT, STAGE = "layout", "layout.zero_stage"
LAYOUTS = ("dp1", "dp2", "shard2", "tp2", "pp2", "dp2·pp2", "dp4", "dp2·tp2", "shard2·tp2", "shard4", "tp2·pp2", "cp2")
BASE: dict[str, Any] = {
    "workload": {"name": "language", "width": 32, "depth": 2, "heads": 4, "context": 32, "max_characters": 20_000},
    "training.steps": STEPS,
    "training.global_batch": 16,
    "training.evaluate_every": STEPS,
    "training.checkpoint_every": 0,
    "training.trace_step": 0,
    "optimizer.lr": 5e-3,
    "optimizer.clip_norm": 1.0,
    "launch.max_duration_s": 300,
    "launch.timeout_s": 60,
}


@dataclass(frozen=True)
class Combination:
    """One experiment; `problems` are the reasons if it is refused."""

    row: Row
    experiment: Experiment
    problems: tuple[Problem, ...] = ()

    def __str__(self) -> str:
        return " + ".join(_describe(field, value) for field, value in self.row.items() if not _is_default(field, value))


@dataclass(frozen=True)
class CombinationResult:
    """The result of a combination: one of OUTCOMES, and the reason."""

    case: Combination
    outcome: str
    reason: str = ""
    learned: float | None = None
    """Its loss reduction as a fraction of that of plain training."""
    shown: tuple[str, ...] = ()
    """The evidence that its methods were active, in words."""
    seconds: float = 0.0
    run_id: str | None = None
    """The run, which is kept unless the outcome is good."""

    def to_dict(self) -> dict[str, Any]:
        """Return the result as a JSON object."""
        figures = {name: value for name, value in vars(self).items() if name != "case"}
        return {"case": str(self.case)} | figures


Pair = tuple[str, Any]
"""A field and its value."""


@functools.cache
def factors() -> dict[str, Sequence[Any]]:
    """Return every field that is varied and its values; the default comes first."""
    varied: dict[str, Sequence[Any]] = {LAYOUT: LAYOUTS, STAGE: (3, 1, 2)}
    choices = ("sparsity", "quantization.training", "gradients.compression", "gradients.update")
    for choice in (*choices, "quantization.qat", "quantization.after_training"):
        varied[CHOICES[choice]] = [name for name in registry(choice).names() if name != AUTO]  # it stands for another
    stale = [name for name, schedule in SCHEDULES.items() if schedule.asynchronous]
    schedules = (Layout.model_fields["schedule"].default, *stale)  # the others are proved equal to one process
    return varied | {"layout.schedule": schedules, "optimizer.state_bits": (32, 8)}


def _is_default(field: str, value: Any) -> bool:
    """Return whether a value need not be named; a layout always is."""
    return field != LAYOUT and bool(value == factors()[field][0])


def _describe(field: str, value: Any) -> str:
    """Return a setting in words, e.g. `dp2`, `ZeRO 1`, `rigl`, `sent as int8` or `trained for int4`."""
    prefixes = {
        STAGE: "ZeRO ",
        "gradients.compression.method": "sent as ",
        "quantization.qat": "trained for ",
        "quantization.after_training": "then ",
        "optimizer.state_bits": "state bits ",
    }
    return f"{prefixes.get(field, '')}{value}"


# -- the combinations -------------------------------------------------------------------------------------------------


class CombinationRules:
    """Applies the rules to complete and partial rows; settings that are not chosen yet have their defaults."""

    def __init__(self) -> None:
        self._base = Experiment().set(BASE)
        self._problems: dict[str, tuple[Problem, ...]] = {}

    def experiment(self, row: Row) -> Experiment:
        """Return the experiment of a row."""
        layout = Layout.parse(row.get(LAYOUT, "dp1")).model_dump()
        layout["zero_stage"] = row.get(STAGE, 3)
        if layout["pp"] > 1:
            layout["microbatches"] = 2
        rest = {field: value for field, value in row.items() if field not in (LAYOUT, STAGE)}
        method = row.get("sparsity.method", "none")
        if method not in ("none", "n_m"):  # the pattern of N:M determines how many
            rest["sparsity.target"] = TARGET
        return self._base.set({"layout": layout} | rest)

    def problems(self, row: Row) -> tuple[Problem, ...]:
        """Return why a row is refused, or which of its settings have no effect."""
        key = repr(sorted(row.items(), key=str))
        if key not in self._problems:
            self._problems[key] = violations(self.experiment(row), row)
        return self._problems[key]

    def allowed(self, row: Row) -> bool:
        """Return whether a row may become a combination; a ZeRO stage is only varied if weights are sharded."""
        if LAYOUT not in row:
            return True
        if row.get(STAGE, 3) != 3 and Layout.parse(row[LAYOUT]).dp_shard == 1:
            return False
        return not self.problems(row)


def cases() -> list[Combination]:
    """Return the combinations that must learn, then the pairs (and single methods) that no legal one contains."""
    rules = CombinationRules()
    covering = CoveringArray(factors(), rules.allowed)
    generated = [Combination(row, rules.experiment(row)) for row in covering.rows]
    for partial_row in covering.infeasible:
        problems = [problem for problem in rules.problems(partial_row) if not is_noop(problem)]
        if problems:
            generated.append(Combination(partial_row, rules.experiment(partial_row), tuple(problems)))
    return generated


def with_settings(
    candidates: Iterable[Combination], requested: Sequence[Pair], ranks: int | None = None
) -> list[Combination]:
    """Return the combinations that contain all requested settings and have at most `ranks` ranks."""
    return [
        case
        for case in candidates
        if set(requested) <= set(case.row.items()) and (ranks is None or case.experiment.layout.world_size <= ranks)
    ]


def parse_setting(text: str) -> Pair:
    """Return the field and the value that a text such as `rigl` or `quantization.training=int8` means.

    ValueError if it means none, or more than one.
    """
    field, _, name = text.rpartition("=")
    matches = [(key, value) for key, values in factors().items() for value in values if str(value) == name]
    matches = [pair for pair in matches if pair[0] == field] if field else matches
    if len(matches) == 1:
        return matches[0]
    if matches:
        options = ", ".join(f"{key}={value}" for key, value in matches)
        raise ValueError(f"{text} is ambiguous; say which: {options}")
    names = sorted({str(value) for values in factors().values() for value in values if isinstance(value, str)})
    raise ValueError(f"no combination has {text!r}; known: {', '.join(names)}")


def sample(candidates: Sequence[Combination], ranks: int = 2) -> list[Combination]:
    """Return few legal combinations with at most `ranks` ranks that contain every layout and method that can occur."""
    legal = (case for case in with_settings(candidates, (), ranks) if not case.problems)
    return greedy_cover((case, set(case.row.items())) for case in legal)


# -- the runs ---------------------------------------------------------------------------------------------------------


def run(cases: Iterable[Combination]) -> Iterator[CombinationResult]:
    """Run the combinations one after another, and yield each result as soon as it is available.

    Runs with a good outcome are removed. RunFailed if plain training, which they are compared with, fails.
    """
    plain = 0.0
    for case in cases:
        begun = time.monotonic()
        if case.problems:
            yield CombinationResult(case, "refused", " ".join(map(str, case.problems)))
            continue
        plain = plain or _plain_loss_reduction()
        try:
            finished = run_to_completion(case.experiment.set({"name": f"combination: {case}"[:200]}))
        except RunFailed as error:
            yield CombinationResult(case, "FAILED", str(error), seconds=time.monotonic() - begun)
            continue
        result = _evaluate(case, finished, plain, time.monotonic() - begun)
        if result.outcome in GOOD:
            safe_files.remove_folder(finished.directory.path)
        yield result


def _plain_loss_reduction() -> float:
    """Return the loss reduction of training in one process without any method."""
    finished = run_to_completion(Experiment().set(BASE))
    reduction = _loss_reduction(finished)
    safe_files.remove_folder(finished.directory.path)
    return reduction


def _loss_reduction(run: Run) -> float:
    """Return the loss of the first step minus the held-out loss at the end."""
    data = run.data()
    return float(data.loss[0]) - data.evaluations[-1][2]["loss"]


def _evaluate(case: Combination, run: Run, plain: float, seconds: float) -> CombinationResult:
    """Return the result of a finished run. `plain`: the loss reduction of plain training."""
    by_method = evidence(case.experiment, run.summary())
    learned = _loss_reduction(run) / plain
    missing = [name for name, sign in by_method.items() if not sign]
    shown = tuple(sign for sign in by_method.values() if sign)
    if missing:
        reason = f"no evidence of {', '.join(missing)}"
        return CombinationResult(case, "OFF", reason, learned, shown, seconds, run.id)
    if not learned >= MIN_LOSS_REDUCTION:  # also if it is NaN
        reason = f"it reduced the loss by {learned:.0%} of the reduction of plain training"
        return CombinationResult(case, "HARDLY", reason, learned, shown, seconds, run.id)
    return CombinationResult(case, "learns", "", learned, shown, seconds)


EVIDENCE: dict[str, tuple[str, str]] = {
    "fp32": ("products", "float32"),
    "fp64": ("products", "float64"),
    "bf16": ("activations", "bfloat16"),
    "fp16": ("activations", "float16"),
    "fp8": ("float8_layers", r"[1-9]\d*"),
    "pure_bf16": ("weights", "bfloat16"),
    "int8": ("int8_products", r"[1-9].*"),
    "int8_weights": ("weights_on_grid", r"(\d+) of \1"),
    "bitnet": ("ternary", r"-1: .*, 0: .*, 1: .*"),
}
"""By precision, the key of `summary.effective` that shows it and the pattern of its value; a precision that is missing
here does not pass.
"""


def evidence(experiment: Experiment, summary: Mapping[str, Any]) -> dict[str, str]:
    """Return for each method of the experiment the evidence that it was active, in words; empty if there is none."""
    signs: dict[str, str] = {}
    effective, sent = summary["effective"], summary["communication"] or {}
    settings, gradients = experiment.quantization, experiment.gradients
    if experiment.sparsity.method != "none":
        zeros = effective["sparsity"]
        signs[experiment.sparsity.method] = f"{zeros:.1%} zeros" if zeros > TARGET - 0.005 else ""
    if settings.qat == "none":
        key, pattern = EVIDENCE.get(settings.training, ("", "nothing"))
        value = str(effective.get(key, ""))
        signs[settings.training] = f"{key} {value}" if re.fullmatch(pattern, value) else ""
    else:
        values, limit = int(effective.get("weight_values", 0)), {"int8": 255, "int4": 16}[settings.qat]
        signs[f"qat {settings.qat}"] = f"{values} values of a weight" if 1 < values <= limit else ""
    if settings.after_training != "none":
        layers = (summary["quantized"] or {}).get("layers", 0)
        signs[settings.after_training] = f"{layers} layers converted" if layers else ""
    if experiment.optimizer.state_bits == 8:
        bits = float(effective.get("optimizer_state_bits", 32))
        signs["8 bits of state"] = f"{bits} bits of state" if bits < 32 else ""
    compressor, update = gradients.compression.method, update_rule(experiment).key
    if compressor != "none":
        signs[compressor] = _traffic_evidence(sent) if sent.get("method") == compressor else ""
    if update != "synchronous":
        signs[update] = _traffic_evidence(sent) or _staleness_evidence(summary["staleness"] or {})
    return signs


def _traffic_evidence(sent: Mapping[str, Any]) -> str:
    """Return in words that the counted bytes match the method's formula (within 1 %); empty if they do not."""
    counted, formula = (sent.get(f"{kind}_bytes_per_step", math.nan) for kind in ("counted", "formula"))
    matches = counted > 0 and abs(counted / formula - 1) < 0.01 if formula else False
    return f"{counted:,.0f} bytes sent, as by its formula" if matches else ""


def _staleness_evidence(staleness: Mapping[str, Any]) -> str:
    """Return in words the mean staleness of the gradients, the evidence of rules without additional traffic."""
    return f"gradients {staleness['mean']:.2g} updates old" if staleness.get("mean", 0.0) > 0 else ""


# -- the table --------------------------------------------------------------------------------------------------------


def counts(results: Iterable[CombinationResult]) -> dict[str, int]:
    """Return the number of combinations with each outcome."""
    outcomes = Counter(result.outcome for result in results)
    return {outcome: outcomes[outcome] for outcome in OUTCOMES}


def markdown(results: Sequence[CombinationResult], asked: int, command: str, seconds: float) -> str:
    """Return the report in Markdown. `asked`: the number of combinations that were requested."""
    number = counts(results)
    lines = [
        "# Combinations",
        "",
        "Every pair of methods that can be combined: layouts, sparsity, precisions, compression, update rules. Each",
        f"line was run with real processes: {STEPS} optimizer steps of a small GPT. It must reduce the held-out loss",
        f"by at least {MIN_LOSS_REDUCTION:.0%} of the reduction of plain training in one process, and there must be",
        "evidence that each method was active: counted zeros, products, codes and bytes. What cannot work is refused",
        "with a reason.",
        "",
        *provenance(command, seconds, "combinations", len(results), number),
    ]
    if len(results) < asked:
        lines += [f"Interrupted: {asked - len(results)} were not run.", ""]
    bad = [result for result in results if result.outcome not in GOOD]
    if bad:
        lines += [
            "## Not good",
            "",
            *(f"- {result.case}: {result.outcome}: {cell(result.reason)}" for result in bad),
            "",
        ]
    lines += ["## Run", "", "| combination | of plain training | evidence |", "|---|---:|---|"]
    for result in results:
        if result.learned is not None:
            row = (str(result.case), f"{result.learned:.0%}", "; ".join(result.shown))
            lines.append("| " + " | ".join(map(cell, row)) + " |")
    lines += ["", "## Refused", "", "| reason | pairs | for example |", "|---|---:|---|"]
    for reason, examples in refusals_by_reason(result.case for result in results).items():
        lines.append(f"| {cell(reason)} | {len(examples)} | {cell(str(examples[0]))} |")
    return "\n".join(lines) + "\n"
