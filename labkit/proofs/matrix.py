"""The parity matrix: each case (`cases.py`) is equal to one process or refused by a rule; none differs, fails or hangs.

Losses and gradient norms of ten optimizer steps and the held-out metrics after them are compared, to 1e-9 in float64
and to 1e-4 in float32. All cases that train the same share one run of one process.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from labkit.experiment import Experiment, Problem, safe_files
from labkit.experiment.machine import Machine
from labkit.experiment.one_process import one_process
from labkit.launch.client import launch
from labkit.proofs.cases import DEADLINE_S, STEPS, Case, cases, sample
from labkit.proofs.parity import TOLERANCE, Parity, compare_losses
from labkit.runs.environment import versions
from labkit.runs.run import Run, RunFailed

__all__ = ["GOOD", "OUTCOMES", "Case", "Result", "cases", "counts", "markdown", "run", "sample"]

OUTCOMES = ("equal", "refused", "DIFFERS", "FAILED", "HUNG")
GOOD = ("equal", "refused")


@dataclass(frozen=True)
class Result:
    """The result of a case: one of OUTCOMES, and the reason."""

    case: Case
    outcome: str
    reason: str = ""
    parity: Parity | None = None
    seconds: float = 0.0
    run_id: str | None = None
    """The run, which is kept if it is not equal."""

    def to_dict(self) -> dict[str, Any]:
        """Return the result as a JSON object: the case as text, the outcome, the differences."""
        case, parity = self.case, self.parity
        return {
            "workload": case.family,
            "layout": case.product,
            "options": case.options,
            "precision": case.precision,
            "outcome": self.outcome,
            "reason": self.reason,
            "max_loss_difference": parity and parity.max_loss_difference,
            "max_gradient_norm_difference": parity and parity.max_gradient_norm_difference,
            "max_metric_difference": parity and parity.max_metric_difference,
            "seconds": round(self.seconds, 2),
            "run_id": self.run_id,
        }


def run(cases: Iterable[Case]) -> Iterator[Result]:
    """Run the cases one after another, and yield each result as soon as it is available.

    Runs that are equal are removed; the others are kept for inspection. An interrupt ends the current run.
    """
    references: dict[str, Run] = {}
    try:
        for case in cases:
            begun = time.monotonic()
            yield _result(case, references, lambda begun=begun: time.monotonic() - begun)  # type: ignore[misc]
    finally:
        for reference in references.values():
            safe_files.remove_folder(reference.directory.path)


def _result(case: Case, references: dict[str, Run], elapsed: Callable[[], float]) -> Result:
    """Run a case and compare it with its reference run, which is added to `references` if it is not there."""
    problems = tuple(case.experiment.problems())
    if problems:
        return Result(case, "refused", " ".join(map(str, problems)))
    reference_experiment = one_process(case.experiment, f"matrix: {case.family} in one process")
    key = reference_experiment.to_json()
    try:
        if key not in references:
            references[key] = _run_bounded(reference_experiment)
        layout_run = _run_bounded(case.experiment.set({"name": f"matrix: {case}"[:200]}))
        parity = compare_losses(layout_run, references[key], STEPS, case.precision)
    except _UnfinishedError as error:
        return Result(case, error.outcome, str(error), seconds=elapsed(), run_id=error.run.id)
    except RunFailed as error:
        return Result(case, "FAILED", str(error), seconds=elapsed())
    if not parity.parity:
        return Result(case, "DIFFERS", str(parity), parity, elapsed(), layout_run.id)
    safe_files.remove_folder(layout_run.directory.path)
    return Result(case, "equal", "", parity, elapsed())


class _UnfinishedError(Exception):
    """A run that did not finish, and the outcome of its case."""

    def __init__(self, run: Run, outcome: str, reason: str) -> None:
        super().__init__(reason)
        self.run, self.outcome = run, outcome


def _run_bounded(experiment: Experiment) -> Run:
    """Run an experiment and return its finished run. _UnfinishedError, within bounded time, if it does not finish."""
    run = launch(experiment, baseline=None)
    try:
        run.wait(DEADLINE_S + 30)  # its supervisor ends it before that
    except TimeoutError:
        run.stop(0.0)
        raise _UnfinishedError(
            run, "HUNG", f"no end after {DEADLINE_S:g} s, and its supervisor did not end it"
        ) from None
    except BaseException:
        run.stop(0.0)
        raise
    if run.state == "finished":
        return run
    cause = run.cause or {}
    outcome = "HUNG" if cause.get("kind") in ("silent", "duration") else "FAILED"
    raise _UnfinishedError(run, outcome, cause.get("message", run.state))


# -- the table --------------------------------------------------------------------------------------------------------


def counts(results: Iterable[Result]) -> dict[str, int]:
    """Return the number of cases with each outcome."""
    outcomes = Counter(result.outcome for result in results)
    return {outcome: outcomes[outcome] for outcome in OUTCOMES}


def markdown(results: Sequence[Result], asked: int, command: str, seconds: float) -> str:
    """Return the report in Markdown: counts, reasons, every case. `asked`: the number of cases that were requested."""
    number = counts(results)
    bad = [result for result in results if result.outcome not in GOOD]
    lines = [
        "# Parity matrix",
        "",
        "Does every layout compute what one process computes? Each line of the last table is a case that was run with",
        f"real processes and compared with one process: losses and global gradient norms of each of {STEPS} optimizer",
        "steps, and held-out metrics at the end. Equal means to "
        + " and ".join(f"{tolerance:.0e} in {kind}" for kind, tolerance in TOLERANCE.items())
        + "; what cannot be equal is refused with a reason.",
        "The cases are generated: all products of axis sizes up to the number of ranks, and all pairs of two settings.",
        "",
        *provenance(command, seconds, "cases", len(results), number),
    ]
    if len(results) < asked:
        lines += [f"Interrupted: {asked - len(results)} cases were not run.", ""]
    if bad:
        lines += [
            "## Not equal",
            "",
            *(f"- {result.case}: {result.outcome}: {cell(result.reason)}" for result in bad),
            "",
        ]
    lines += ["## Refused", "", "| reason | cases | for example |", "|---|---:|---|"]
    for reason, cases_of in refusals_by_reason(result.case for result in results).items():
        lines.append(f"| {cell(reason)} | {len(cases_of)} | {cell(str(cases_of[0]))} |")
    lines += ["", "## Run", "", "| workload | layout | options | precision | loss | gradient norm | metrics |"]
    lines.append("|---|---|---|---|---:|---:|---:|")
    for result in results:
        if result.parity is not None:
            parity = result.parity
            figures = (
                parity.max_loss_difference,
                parity.max_gradient_norm_difference,
                parity.max_metric_difference or 0.0,
            )
            case = result.case
            cells = [case.family, case.product, case.options, case.precision, *(f"{figure:.0e}" for figure in figures)]
            lines.append("| " + " | ".join(map(cell, cells)) + " |")
    return "\n".join(lines) + "\n"


class Refusable(Protocol):
    """A case that may be refused."""

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Why it is refused; empty if it is not."""


RefusableT = TypeVar("RefusableT", bound=Refusable)


def refusals_by_reason(cases: Iterable[RefusableT]) -> dict[str, list[RefusableT]]:
    """Return the refused cases by reason (the text of the rule without numbers), the most frequent first."""
    groups: dict[str, list[tuple[str, RefusableT]]] = {}
    for case in cases:
        for problem in case.problems[:1]:
            key = problem.field + re.sub(r"\d+", "", problem.reason)
            groups.setdefault(key, []).append((f"`{problem.field}`: {problem.reason}", case))
    ordered = sorted(groups.values(), key=len, reverse=True)
    return {group[0][0]: [case for _, case in group] for group in ordered}


def provenance(command: str, seconds: float, what: str, total: int, number: Mapping[str, int]) -> list[str]:
    """Return the lines about the origin of a report (command, machine, time), and the table of its counts."""
    machine = Machine.here()
    return [
        f"Made by `{command}` on {machine.cpu_model} ({machine.cores} cores), torch {versions().get('torch')}, "
        f"{time.strftime('%Y-%m-%d')}, in {seconds / 60:.0f} minutes.",
        "",
        "| " + " | ".join((what, *number)) + " |",
        "|" + "---:|" * (1 + len(number)),
        "| " + " | ".join(str(figure) for figure in (total, *number.values())) + " |",
        "",
    ]


def cell(text: str) -> str:
    """Escape text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")
