"""Combinations of methods: layout × sparsity × number formats × compression × update rule, every pair of them.

What trains another network than one process would cannot be proven equal to it. But it has to learn, and each of its
methods has to show that it was on; or a rule refuses it. The rows are a covering array, like those of the parity
matrix: methods come from the registries, so that a new one enters by itself.
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
from labkit.proofs.cases import against, idles
from labkit.proofs.covering import CoveringArray, Row, greedy_cover
from labkit.proofs.finish import finished
from labkit.proofs.matrix import cell, made_by, reasons
from labkit.runs.run import Run, RunFailed

OUTCOMES = ("learns", "refused", "OFF", "HARDLY", "FAILED")
GOOD = ("learns", "refused")
STEPS = 64
LEAST = 0.5
"""Of what plain training takes off the loss, a combination has to take off so much at least."""
TARGET = 0.5
"""Part of the weights that become zero."""
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
    """One experiment; `problems` says why it is refused, if it is."""

    row: Row
    experiment: Experiment
    problems: tuple[Problem, ...] = ()

    def __str__(self) -> str:
        return " + ".join(_word(field, value) for field, value in self.row.items() if not _usual(field, value))


@dataclass(frozen=True)
class Result:
    """What became of it: one of OUTCOMES, and why."""

    case: Combination
    outcome: str
    reason: str = ""
    learned: float | None = None
    """What it took off the loss, of what plain training takes off it."""
    shown: tuple[str, ...] = ()
    """How its methods showed that they were on."""
    seconds: float = 0.0
    run_id: str | None = None
    """The run, kept if it is not good."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        own = {name: value for name, value in vars(self).items() if name != "case"}
        return {"case": str(self.case)} | own


Pair = tuple[str, Any]
"""A field and its value."""


@functools.cache
def factors() -> dict[str, Sequence[Any]]:
    """Everything that is varied: the field and its values, the usual one first."""
    found: dict[str, Sequence[Any]] = {LAYOUT: LAYOUTS, STAGE: (3, 1, 2)}
    knobs = ("sparsity", "quantization.training", "gradients.compression", "gradients.update")
    for knob in (*knobs, "quantization.qat", "quantization.after_training"):
        found[CHOICES[knob]] = registry(knob).names(available_only=True)
    return found | {"optimizer.state_bits": (32, 8)}


def _usual(field: str, value: Any) -> bool:
    return field != LAYOUT and bool(value == factors()[field][0])


def _word(field: str, value: Any) -> str:
    """`dp2`, `ZeRO 1`, `rigl`, `sent as int8`, `trained for int4`, …"""
    before = {
        STAGE: "ZeRO ",
        "gradients.compression.method": "sent as ",
        "quantization.qat": "trained for ",
        "quantization.after_training": "then ",
        "optimizer.state_bits": "state bits ",
    }
    return f"{before.get(field, '')}{value}"


# -- which ------------------------------------------------------------------------------------------------------------


class Judge:
    """What the rules say about rows, whole or in part; what is not chosen yet is as usual."""

    def __init__(self) -> None:
        self._base = Experiment().set(BASE)
        self._problems: dict[str, tuple[Problem, ...]] = {}

    def experiment(self, row: Row) -> Experiment:
        """The experiment of a row."""
        layout = Layout.parse(row.get(LAYOUT, "dp1")).model_dump()
        layout["zero_stage"] = row.get(STAGE, 3)
        if layout["pp"] > 1:
            layout["microbatches"] = 2
        rest = {field: value for field, value in row.items() if field not in (LAYOUT, STAGE)}
        method = row.get("sparsity.method", "none")
        if method not in ("none", "n_m"):  # N:M says by itself how many
            rest["sparsity.target"] = TARGET
        return self._base.set({"layout": layout} | rest)

    def problems(self, row: Row) -> tuple[Problem, ...]:
        """Why it is refused, or which of its settings does nothing."""
        key = repr(sorted(row.items(), key=str))
        if key not in self._problems:
            self._problems[key] = against(self.experiment(row), row)
        return self._problems[key]

    def allowed(self, row: Row) -> bool:
        """May this row be, or become, a combination? A stage of ZeRO says something where weights are sharded."""
        if LAYOUT not in row:
            return True
        if row.get(STAGE, 3) != 3 and Layout.parse(row[LAYOUT]).dp_shard == 1:
            return False
        return not self.problems(row)


def cases() -> list[Combination]:
    """The combinations that have to learn, then the pairs (and single methods) that no legal one holds."""
    judge = Judge()
    covering = CoveringArray(factors(), judge.allowed)
    found = [Combination(row, judge.experiment(row)) for row in covering.rows]
    for part in covering.impossible:
        problems = [one for one in judge.problems(part) if not idles(one)]
        if problems:
            found.append(Combination(part, judge.experiment(part), tuple(problems)))
    return found


def holding(found: Iterable[Combination], wanted: Sequence[Pair], ranks: int | None = None) -> list[Combination]:
    """Those that hold all of these pairs of a field and its value, and have at most so many ranks."""
    return [
        case
        for case in found
        if set(wanted) <= set(case.row.items()) and (ranks is None or case.experiment.layout.world_size <= ranks)
    ]


def named(text: str) -> Pair:
    """The field and the value that `rigl`, or `quantization.training=int8` where several have it, stands for.

    ValueError where it is none, or more than one.
    """
    field, _, value = text.rpartition("=")
    found = [(key, one) for key, values in factors().items() for one in values if str(one) == value]
    found = [pair for pair in found if pair[0] == field] if field else found
    if len(found) == 1:
        return found[0]
    if found:
        said = ", ".join(f"{key}={one}" for key, one in found)
        raise ValueError(f"{text} stands for several; say which: {said}")
    known = sorted({str(one) for values in factors().values() for one in values if isinstance(one, str)})
    raise ValueError(f"no combination has {text!r}; known: {', '.join(known)}")


def sample(found: Sequence[Combination], ranks: int = 2) -> list[Combination]:
    """Few of the legal ones with so many ranks at most, in which every layout and every method stands that can."""
    legal = (case for case in holding(found, (), ranks) if not case.problems)
    return greedy_cover((case, set(case.row.items())) for case in legal)


# -- what becomes of them ---------------------------------------------------------------------------------------------


def run(found: Iterable[Combination]) -> Iterator[Result]:
    """Run them, one after the other; yields each result as soon as it is there. Good runs are removed.

    RunFailed if plain training, which they are compared with, does not come to its end.
    """
    plain = 0.0
    for case in found:
        begun = time.monotonic()
        if case.problems:
            yield Result(case, "refused", " ".join(map(str, case.problems)))
            continue
        plain = plain or _plain()
        try:
            one = finished(case.experiment.set({"name": f"combination: {case}"[:200]}))
        except RunFailed as error:
            yield Result(case, "FAILED", str(error), seconds=time.monotonic() - begun)
            continue
        result = _judged(case, one, plain, time.monotonic() - begun)
        if result.outcome in GOOD:
            safe_files.remove_folder(one.directory.path)
        yield result


def _plain() -> float:
    """What training in one process, with no method at all, takes off the held-out loss."""
    one = finished(Experiment().set(BASE))
    off = _fall(one)
    safe_files.remove_folder(one.directory.path)
    return off


def _fall(one: Run) -> float:
    """From the loss of the first update to that on held-out data at the end."""
    data = one.data()
    return float(data.loss[0]) - data.evaluations[-1][2]["loss"]


def _judged(case: Combination, one: Run, plain: float, seconds: float) -> Result:
    shown = proofs(case.experiment, one.summary())
    learned = _fall(one) / plain
    missing = [name for name, proof in shown.items() if not proof]
    words = tuple(proof for proof in shown.values() if proof)
    if missing:
        return Result(case, "OFF", f"{', '.join(missing)} did not show", learned, words, seconds, one.id)
    if not learned >= LEAST:  # a loss that is no number is not above anything
        reason = f"it took off {learned:.0%} of what plain training takes off the loss"
        return Result(case, "HARDLY", reason, learned, words, seconds, one.id)
    return Result(case, "learns", "", learned, words, seconds)


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
"""Of number formats, what of them is measured in `summary.effective`, and what has to stand there; one that is not
here does not pass.
"""


def proofs(experiment: Experiment, summary: Mapping[str, Any]) -> dict[str, str]:
    """By method of the experiment, in words how a run of it showed that it was on; empty where it did not."""
    found: dict[str, str] = {}
    effective, sent = summary["effective"], summary["communication"] or {}
    settings, gradients = experiment.quantization, experiment.gradients
    if experiment.sparsity.method != "none":
        zeros = effective["sparsity"]
        found[experiment.sparsity.method] = f"{zeros:.1%} zeros" if zeros > TARGET - 0.005 else ""
    if settings.qat == "none":
        key, wanted = EVIDENCE.get(settings.training, ("", "nothing"))
        value = str(effective.get(key, ""))
        found[settings.training] = f"{key} {value}" if re.fullmatch(wanted, value) else ""
    else:
        values, most = int(effective.get("weight_values", 0)), {"int8": 255, "int4": 16}[settings.qat]
        found[f"qat {settings.qat}"] = f"{values} values of a weight" if 1 < values <= most else ""
    if settings.after_training != "none":
        layers = (summary["quantized"] or {}).get("layers", 0)
        found[settings.after_training] = f"{layers} layers converted" if layers else ""
    if experiment.optimizer.state_bits == 8:
        bits = float(effective.get("optimizer_state_bits", 32))
        found["8 bits of state"] = f"{bits} bits of state" if bits < 32 else ""
    compressor, update = gradients.compression.method, gradients.update.method
    if compressor != "none":
        found[compressor] = _sent(sent) if sent.get("method") == compressor else ""
    if update != "synchronous":
        found[update] = _sent(sent) or _stale(summary["staleness"] or {})
    return found


def _sent(sent: Mapping[str, Any]) -> str:
    """Were so many bytes counted as the formula of the method has?"""
    counted, formula = (sent.get(f"{kind}_bytes_per_step", math.nan) for kind in ("counted", "formula"))
    right = counted > 0 and abs(counted / formula - 1) < 0.01 if formula else False
    return f"{counted:,.0f} bytes sent, as by its formula" if right else ""


def _stale(staleness: Mapping[str, Any]) -> str:
    """Of rules that send nothing, or nothing more than others: did they use gradients of older weights?"""
    return f"gradients {staleness['mean']:.2g} updates old" if staleness.get("mean", 0.0) > 0 else ""


# -- the table --------------------------------------------------------------------------------------------------------


def counts(results: Iterable[Result]) -> dict[str, int]:
    """How many came out how."""
    found = Counter(result.outcome for result in results)
    return {outcome: found[outcome] for outcome in OUTCOMES}


def markdown(results: Sequence[Result], asked: int, command: str, seconds: float) -> str:
    """The table for people."""
    number = counts(results)
    lines = [
        "# Combinations",
        "",
        "Every pair of methods that may meet at all: layouts, sparsity, number formats, compression, update rules.",
        f"Each line was run with real processes: {STEPS} updates of a small GPT. It has to take at least {LEAST:.0%}",
        "of what plain training in one process takes off the held-out loss, and each method has to show that it was",
        "on: zeros, products, codes and bytes counted. What cannot be is refused with a reason.",
        "",
        *made_by(command, seconds, "combinations", len(results), number),
    ]
    if len(results) < asked:
        lines += [f"Interrupted: {asked - len(results)} were not run.", ""]
    bad = [result for result in results if result.outcome not in GOOD]
    if bad:
        lines += ["## Not good", "", *(f"- {one.case}: {one.outcome}: {cell(one.reason)}" for one in bad), ""]
    lines += ["## Run", "", "| combination | of plain training | shown by |", "|---|---:|---|"]
    for one in results:
        if one.learned is not None:
            lines.append(f"| {cell(str(one.case))} | {one.learned:.0%} | {cell('; '.join(one.shown))} |")
    lines += ["", "## Refused", "", "| reason | pairs | for example |", "|---|---:|---|"]
    for reason, examples in reasons(one.case for one in results).items():
        lines.append(f"| {cell(reason)} | {len(examples)} | {cell(str(examples[0]))} |")
    return "\n".join(lines) + "\n"
