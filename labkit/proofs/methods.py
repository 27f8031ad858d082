"""Every compressor and update rule at its defaults, compared with synchronous training: what it learns and sends.

All use the same workload, samples and seed. These methods change the mathematics, so nothing here is a proof of
equality: it measures the loss of each method after the same samples.
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
from labkit.proofs.finish import run_to_completion
from labkit.runs.checked import figure_or_words, formatted
from labkit.runs.environment import versions
from labkit.runs.run import RunFailed

CHOICE_FIELDS = ("gradients.compression", "gradients.update")
PLAIN = "synchronous"
"""The method that the others are compared with; its case comes first."""


@dataclass(frozen=True)
class MethodCase:
    """A recipe with a method on a number of ranks."""

    recipe: str
    ranks: int
    method: str
    summary: str
    experiment: Experiment


@dataclass(frozen=True)
class MethodResult:
    """The result of a case. `reason`: why it was refused or failed, otherwise empty."""

    case: MethodCase
    reason: str = ""
    run_id: str | None = None
    metric: float | None = None
    metric_title: str = ""
    loss: float | None = None
    """Loss on held-out data at the end."""
    gap: float | None = None
    """Relative difference of this loss from that of synchronous training."""
    bytes_per_step: float | None = None
    """Bytes that one rank sends per optimizer step, counted."""
    staleness: float | None = None
    samples_per_second: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the result as a JSON object."""
        case = self.case
        settings = {"recipe": case.recipe, "ranks": case.ranks, "method": case.method}
        return settings | {
            name: figure_or_words(value) for name, value in vars(self).items() if name not in ("case", "metric_title")
        }


def cases(
    recipes: Iterable[tuple[str, Experiment]], ranks: Iterable[int], only: Sequence[str] = ()
) -> list[MethodCase]:
    """Return a case for every method, or for those in `only` if it is not empty; synchronous training comes first."""
    generated = []
    for name, experiment in recipes:
        for count in ranks:
            base = experiment.set({"layout": {"dp_replicate": count}})
            plain = registry("gradients.update")[PLAIN]
            generated.append(MethodCase(name, count, PLAIN, plain.summary, base.set({"name": f"{name}: {PLAIN}"})))
            for choice in CHOICE_FIELDS:
                for method in registry(choice):
                    if method.key in ("none", PLAIN) or (only and method.key not in only):
                        continue
                    changed = base.set({CHOICES[choice]: method.key, "name": f"{name}: {method.key}"})
                    generated.append(MethodCase(name, count, method.key, method.summary, changed))
    return generated


def run(cases: Iterable[MethodCase]) -> Iterator[MethodResult]:
    """Run one case after another, and yield each result as soon as it is available."""
    reference_losses: dict[tuple[str, int], float | None] = {}
    for case in cases:
        problems = case.experiment.problems()
        if problems:
            yield MethodResult(case, " ".join(map(str, problems)))
            continue
        try:
            finished = run_to_completion(case.experiment)
        except RunFailed as error:
            yield MethodResult(case, f"failed: {error}")
            continue
        summary = finished.summary()
        evaluations, metric = finished.data().evaluations, summary["metric"] or {}
        metrics = evaluations[-1][2] if evaluations else {}
        loss, key = metrics.get("loss"), (case.recipe, case.ranks)
        if case.method == PLAIN:
            reference_losses[key] = loss
        reference = reference_losses.get(key)
        sent = summary["communication"] or {}
        yield MethodResult(
            case,
            run_id=finished.id,
            metric=metrics.get(metric.get("key", "")),
            metric_title=metric.get("title", ""),
            loss=loss,
            gap=None if loss is None or not reference else loss / reference - 1,
            bytes_per_step=sent.get("counted_bytes_per_step"),
            staleness=(summary["staleness"] or {}).get("mean"),
            samples_per_second=summary["samples_per_second"],
        )


# -- the table --------------------------------------------------------------------------------------------------------


def markdown(results: Sequence[MethodResult], asked: int, command: str, seconds: float) -> str:
    """Return the report in Markdown. `asked`: the number of cases that were requested."""
    machine = Machine.here()
    lines = [
        "# Methods at their defaults",
        "",
        "What every compressor and update rule learns and sends, compared with synchronous training on the same",
        "samples. The gap is the relative difference of the held-out loss; below zero the method ended lower. Bytes",
        "are those that one rank sends per optimizer step, counted where they are sent. Rows of one recipe and number",
        "of ranks have the same seed.",
        "",
        f"Made by `{command}` on {machine.cpu_model} ({machine.cores} cores), torch {versions().get('torch')}, "
        f"{time.strftime('%Y-%m-%d')}, in {seconds / 60:.0f} minutes.",
    ]
    if len(results) < asked:
        lines += ["", f"Interrupted: {asked - len(results)} cases were not run."]
    for recipe, ranks in dict.fromkeys((result.case.recipe, result.case.ranks) for result in results):
        rows = [result for result in results if (result.case.recipe, result.case.ranks) == (recipe, ranks)]
        title = next((row.metric_title for row in rows if row.metric_title), "metric")
        lines += ["", f"## {recipe}, {ranks} ranks", ""]
        lines.append(f"| method | what it does | {title.lower()} | loss | gap | sent per update | mean staleness |")
        lines.append("|---|---|---:|---:|---:|---:|---:|")
        for row in rows:
            if row.reason:
                lines.append(f"| {row.case.method} | {_cell(row.reason)} | | | | | |")
                continue
            figures = (
                _number(row.metric, ".4g"),
                _number(row.loss, ".4f"),
                _number(row.gap, "+.1%"),
                "" if row.bytes_per_step is None else f"{row.bytes_per_step / 1e3:,.1f} kB",
                _number(row.staleness, ".2f"),
            )
            lines.append("| " + " | ".join((row.case.method, _cell(row.case.summary), *figures)) + " |")
    return "\n".join(lines) + "\n"


def _number(value: float | None, form: str) -> str:
    """Return a number in the given format; an empty cell for None."""
    return "" if value is None else formatted(value, form)


def _cell(text: str) -> str:
    """Escape text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")
