"""The parity matrix: each case (`cases.py`) is equal to one process or refused by a rule; none differs, fails or hangs.

Losses and gradient norms of ten updates and the held-out metrics after them are compared, to 1e-9 in float64 and to
1e-4 in float32. One process is run once for all cases that train the same.
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
    """What became of a case: one of OUTCOMES, and why."""

    case: Case
    outcome: str
    reason: str = ""
    parity: Parity | None = None
    seconds: float = 0.0
    run_id: str | None = None
    """The run, kept if it is not equal."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the case in words, the outcome, the differences."""
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


def run(found: Iterable[Case]) -> Iterator[Result]:
    """Run the cases, one after the other; yields each result as soon as it is there.

    Runs that are equal are removed, the others stay to be looked at. An interrupt ends the run that is going on.
    """
    references: dict[str, Run] = {}
    try:
        for case in found:
            begun = time.monotonic()
            yield _result(case, references, lambda begun=begun: time.monotonic() - begun)  # type: ignore[misc]
    finally:
        for reference in references.values():
            safe_files.remove_folder(reference.directory.path)


def _result(case: Case, references: dict[str, Run], elapsed: Callable[[], float]) -> Result:
    problems = tuple(case.experiment.problems())
    if problems:
        return Result(case, "refused", " ".join(map(str, problems)))
    alone = one_process(case.experiment, f"matrix: {case.family} in one process")
    key = alone.to_json()
    try:
        if key not in references:
            references[key] = _finished(alone)
        one = _finished(case.experiment.set({"name": f"matrix: {case}"[:200]}))
        parity = compare_losses(one, references[key], STEPS, case.precision)
    except _Unfinished as error:
        return Result(case, error.outcome, str(error), seconds=elapsed(), run_id=error.run.id)
    except RunFailed as error:
        return Result(case, "FAILED", str(error), seconds=elapsed())
    if not parity.parity:
        return Result(case, "DIFFERS", str(parity), parity, elapsed(), one.id)
    safe_files.remove_folder(one.directory.path)
    return Result(case, "equal", "", parity, elapsed())


class _Unfinished(Exception):
    def __init__(self, run: Run, outcome: str, why: str) -> None:
        super().__init__(why)
        self.run, self.outcome = run, outcome


def _finished(experiment: Experiment) -> Run:
    """A run that came to its end; _Unfinished, within bounded time, if it did not."""
    run = launch(experiment, baseline=None)
    try:
        run.wait(DEADLINE_S + 30)  # its supervisor ends it before that
    except TimeoutError:
        run.stop(0.0)
        raise _Unfinished(run, "HUNG", f"no end after {DEADLINE_S:g} s, and its supervisor did not end it") from None
    except BaseException:
        run.stop(0.0)
        raise
    if run.state == "finished":
        return run
    cause = run.cause or {}
    outcome = "HUNG" if cause.get("kind") in ("silent", "duration") else "FAILED"
    raise _Unfinished(run, outcome, cause.get("message", run.state))


# -- the table --------------------------------------------------------------------------------------------------------


def counts(results: Iterable[Result]) -> dict[str, int]:
    """How many cases came out how."""
    found = Counter(result.outcome for result in results)
    return {outcome: found[outcome] for outcome in OUTCOMES}


def markdown(results: Sequence[Result], asked: int, command: str, seconds: float) -> str:
    """The table for people: what it is, counts, reasons, every case. `asked`: the number of cases there were to run."""
    number = counts(results)
    bad = [result for result in results if result.outcome not in GOOD]
    lines = [
        "# Parity matrix",
        "",
        "Does every layout compute what one process computes? Each line of the last table is a case that was run with",
        f"real processes beside one process: {STEPS} updates, losses and global gradient norms compared update by",
        "update, held-out metrics at the end. Equal means to "
        + " and ".join(f"{tolerance:.0e} in {kind}" for kind, tolerance in TOLERANCE.items())
        + "; what cannot be equal is refused with a reason.",
        "The cases are generated: all products of axis sizes up to the number of ranks, and all pairs of two settings.",
        "",
        *made_by(command, seconds, "cases", len(results), number),
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
    for reason, cases_of in reasons(result.case for result in results).items():
        lines.append(f"| {cell(reason)} | {len(cases_of)} | {cell(str(cases_of[0]))} |")
    lines += ["", "## Run", "", "| workload | layout | options | format | loss | gradient norm | metrics |"]
    lines.append("|---|---|---|---|---:|---:|---:|")
    for result in results:
        if result.parity is not None:
            found = result.parity
            figures = (
                found.max_loss_difference,
                found.max_gradient_norm_difference,
                found.max_metric_difference or 0.0,
            )
            case = result.case
            cells = [case.family, case.product, case.options, case.precision, *(f"{figure:.0e}" for figure in figures)]
            lines.append("| " + " | ".join(map(cell, cells)) + " |")
    return "\n".join(lines) + "\n"


class Refusable(Protocol):
    """What may be refused; `problems` says why."""

    @property
    def problems(self) -> tuple[Problem, ...]: ...


Some = TypeVar("Some", bound=Refusable)


def reasons(cases: Iterable[Some]) -> dict[str, list[Some]]:
    """The refused cases by what the rule says, numbers and names of schedules apart; the most frequent first."""
    groups: dict[str, list[tuple[str, Some]]] = {}
    for case in cases:
        for problem in case.problems[:1]:
            key = problem.field + re.sub(r"\d+", "", problem.reason)
            groups.setdefault(key, []).append((f"`{problem.field}`: {problem.reason}", case))
    ordered = sorted(groups.values(), key=len, reverse=True)
    return {group[0][0]: [case for _, case in group] for group in ordered}


def made_by(command: str, seconds: float, what: str, total: int, number: Mapping[str, int]) -> list[str]:
    """Of a table: by which command, on what machine, how long it took; and how many of all came out how."""
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
    """Text as a cell of a table in Markdown."""
    return text.replace("|", "\\|").replace("\n", " ")
