"""Every way to combine gradients, at its defaults, beside synchronous training: what it learns and what it sends.

Same workload, samples and seed for all. The method changes the mathematics, so nothing here is a proof of equality: it
is the loss that each of them pays at equal samples, measured.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from labkit.experiment import Experiment
from labkit.experiment.machine import Machine
from labkit.experiment.registry import registry
from labkit.experiment.rules import CHOICES
from labkit.proofs.finish import finished
from labkit.runs.checked import figure_or_words, formatted
from labkit.runs.environment import versions
from labkit.runs.run import RunFailed

KNOBS = ("gradients.compression", "gradients.update")
PLAIN = "synchronous"
"""The method that the others are compared with; it comes first."""


@dataclass(frozen=True)
class Case:
    """A recipe with a method on so many ranks."""

    recipe: str
    ranks: int
    method: str
    summary: str
    experiment: Experiment


@dataclass(frozen=True)
class Learned:
    """What became of a case. `reason`: why it was refused or failed, if it was."""

    case: Case
    reason: str = ""
    run_id: str | None = None
    metric: float | None = None
    metric_title: str = ""
    loss: float | None = None
    """On held-out data, at the end."""
    gap: float | None = None
    """Of this loss to that of synchronous training, relative."""
    bytes_per_step: float | None = None
    """Sent by one rank, counted."""
    staleness: float | None = None
    samples_per_second: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        case = self.case
        named = {"recipe": case.recipe, "ranks": case.ranks, "method": case.method}
        return named | {
            name: figure_or_words(value) for name, value in vars(self).items() if name not in ("case", "metric_title")
        }


def cases(recipes: Iterable[tuple[str, Experiment]], ranks: Iterable[int], only: Sequence[str] = ()) -> list[Case]:
    """All methods that this version has, the plain one first; `only` these, if any are named."""
    found = []
    for name, experiment in recipes:
        for count in ranks:
            base = experiment.set({"layout": {"dp_replicate": count}})
            plain = registry("gradients.update")[PLAIN]
            found.append(Case(name, count, PLAIN, plain.summary, base.set({"name": f"{name}: {PLAIN}"})))
            for knob in KNOBS:
                for method in registry(knob):
                    if method.key in ("none", PLAIN) or not method.available or (only and method.key not in only):
                        continue
                    changed = base.set({CHOICES[knob]: method.key, "name": f"{name}: {method.key}"})
                    found.append(Case(name, count, method.key, method.summary, changed))
    return found


def run(found: Iterable[Case]) -> Iterator[Learned]:
    """One case after the other; yields each as soon as it is there."""
    plain: dict[tuple[str, int], float | None] = {}
    for case in found:
        problems = case.experiment.problems()
        if problems:
            yield Learned(case, " ".join(map(str, problems)))
            continue
        try:
            one = finished(case.experiment)
        except RunFailed as error:
            yield Learned(case, f"failed: {error}")
            continue
        summary = one.summary()
        evaluations, about = one.data().evaluations, summary["metric"] or {}
        metrics = evaluations[-1][2] if evaluations else {}
        loss, key = metrics.get("loss"), (case.recipe, case.ranks)
        if case.method == PLAIN:
            plain[key] = loss
        reference = plain.get(key)
        sent = summary["communication"] or {}
        yield Learned(
            case,
            run_id=one.id,
            metric=metrics.get(about.get("key", "")),
            metric_title=about.get("title", ""),
            loss=loss,
            gap=None if loss is None or not reference else loss / reference - 1,
            bytes_per_step=sent.get("counted_bytes_per_step"),
            staleness=(summary["staleness"] or {}).get("mean"),
            samples_per_second=summary["samples_per_second"],
        )


# -- the table --------------------------------------------------------------------------------------------------------


def markdown(learned: Sequence[Learned], asked: int, command: str, seconds: float) -> str:
    """The table for people."""
    machine = Machine.here()
    lines = [
        "# Methods at their defaults",
        "",
        "What every way to combine gradients learns and sends, beside synchronous training on the same samples. The",
        "gap is that of the held-out loss, relative; below zero the method ended lower. Bytes are those that one rank",
        "sends per update, counted where they leave. Rows of one recipe and number of ranks have the same seed.",
        "",
        f"Made by `{command}` on {machine.cpu_model} ({machine.cores} cores), torch {versions().get('torch')}, "
        f"{time.strftime('%Y-%m-%d')}, in {seconds / 60:.0f} minutes.",
    ]
    if len(learned) < asked:
        lines += ["", f"Interrupted: {asked - len(learned)} cases were not run."]
    for recipe, ranks in dict.fromkeys((one.case.recipe, one.case.ranks) for one in learned):
        rows = [one for one in learned if (one.case.recipe, one.case.ranks) == (recipe, ranks)]
        title = next((one.metric_title for one in rows if one.metric_title), "metric")
        lines += ["", f"## {recipe}, {ranks} ranks", ""]
        lines.append(f"| method | what it does | {title.lower()} | loss | gap | sent per update | mean staleness |")
        lines.append("|---|---|---:|---:|---:|---:|---:|")
        for one in rows:
            if one.reason:
                lines.append(f"| {one.case.method} | {_cell(one.reason)} | | | | | |")
                continue
            figures = (
                _number(one.metric, ".4g"),
                _number(one.loss, ".4f"),
                _number(one.gap, "+.1%"),
                "" if one.bytes_per_step is None else f"{one.bytes_per_step / 1e3:,.1f} kB",
                _number(one.staleness, ".2f"),
            )
            lines.append("| " + " | ".join((one.case.method, _cell(one.case.summary), *figures)) + " |")
    return "\n".join(lines) + "\n"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else formatted(value, form)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
