"""Comparing runs: speed-up over a named baseline, efficiency, and what the machine could have given.

Speed-up is throughput ÷ throughput of the baseline: same workload, global batch, seed, precision and threads per rank,
on one process. The ceiling is what as many independent copies reach at once on this machine (`launch.isolated`), over
the same baseline: it separates what the method costs from what the machine lacks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from labkit.experiment import Experiment, ExperimentError, Problem
from labkit.experiment.one_process import is_one_process
from labkit.experiment.run_directory import RunDirectory, read_json
from labkit.runs import methods, steady
from labkit.runs.checked import formatted
from labkit.runs.data import RunData
from labkit.runs.status import reconcile

if TYPE_CHECKING:
    import pandas as pd

SEARCHED = 300
"""How many of the latest runs are looked at for a baseline."""


@dataclass(frozen=True)
class RunMeasurement:
    """One run with its steady-state step time."""

    directory: RunDirectory
    experiment: Experiment
    status: dict[str, Any]
    data: RunData
    steady: steady.SteadyState

    @classmethod
    def read(cls, directory: RunDirectory) -> RunMeasurement:
        """Read a run from disk; ExperimentError if its experiment cannot be read."""
        data = RunData(directory)
        data.refresh()
        experiment = Experiment.of_run(directory)
        seconds = _step_seconds(data, experiment.launch.isolated)
        return cls(
            directory,
            experiment,
            reconcile(directory),
            data,
            steady.SteadyState.of(seconds, methods.period(experiment)),
        )

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.experiment.layout.world_size

    @property
    def is_ceiling(self) -> bool:
        return self.experiment.launch.isolated and self.experiment.layout.world_size > 1

    @property
    def is_baseline(self) -> bool:
        return is_one_process(self.experiment) and self.status["state"] in ("finished", "stopped")

    @property
    def samples_per_second(self) -> float | None:
        """Median throughput over all ranks after the warm-up."""
        return self.experiment.training.global_batch / self.steady.median if self.steady.median else None

    @property
    def created(self) -> float:
        return float(self.status.get("created") or 0.0)


def _step_seconds(data: RunData, isolated: bool) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Seconds per step of the run, shape [steps]: the mean over its ranks, which wait for each other.

    Isolated ranks do not, so it is their rates that add up: the harmonic mean.
    """
    columns = [seconds for seconds in data.seconds if len(seconds)]
    if not columns:
        return np.empty(0)
    length = min(len(seconds) for seconds in columns)
    table = np.stack([seconds[:length] for seconds in columns]).astype(np.float64)
    if isolated and (table > 0).all():
        return np.asarray(1 / np.mean(1 / table, axis=0))
    return np.asarray(np.mean(table, axis=0))


def differences(one: Experiment, other: Experiment) -> list[str]:
    """What makes two experiments incomparable in speed; [] when only the layout and the method differ."""
    pairs = {
        "workload": (one.workload, other.workload),
        "global batch": (one.training.global_batch, other.training.global_batch),
        "seed": (one.training.seed, other.training.seed),
        "precision": tuple(each.quantization.model_copy(update={"after_training": ""}) for each in (one, other)),
        "optimizer": (one.optimizer, other.optimizer),
        "loader": (one.training.loader_workers, other.training.loader_workers),
        "threads per rank": (one.launch.threads_per_rank, other.launch.threads_per_rank),
        "device": (one.launch.device, other.launch.device),
    }
    return [f"other {name}" for name, (a, b) in pairs.items() if a != b]


def named_baseline(run: Any) -> RunDirectory:
    """The run that is to be the baseline; ExperimentError if it cannot be one, FileNotFoundError if it is unknown."""
    directory = _directory(run)
    if not is_one_process(Experiment.of_run(directory)):
        reason = f"run {directory.id} is not one process that computes the batch in one pass, so it is no baseline"
        raise ExperimentError([Problem("baseline", reason)])
    return directory


def find_baseline(directory: RunDirectory) -> RunDirectory | None:
    """The latest finished one-process run on this machine that `directory` can be compared with."""
    experiment = Experiment.of_run(directory)
    host = _entry(directory.environment, "host")
    for other in list(RunDirectory.all(directory.path.parent.parent))[-SEARCHED:][::-1]:
        if other.id == directory.id:
            continue
        try:
            candidate = Experiment.of_run(other)
        except ExperimentError:
            continue
        if not is_one_process(candidate) or differences(experiment, candidate):
            continue
        if _entry(other.environment, "host") == host and _entry(other.status, "state") == "finished":
            return other
    return None


def _entry(path: Path, name: str) -> Any:
    """One entry of a JSON file in a run directory; None where there is none."""
    content = read_json(path)
    return content.get(name) if isinstance(content, dict) else None


@dataclass(frozen=True)
class Comparison:
    """Runs side by side. `rows` is one dict a run; `baseline_run_id` names what speed-ups refer to."""

    rows: list[dict[str, Any]]
    baseline_run_id: str | None
    left_out: list[str] = field(default_factory=list)
    """Why runs that were asked for are not in it, each in one sentence that names the run."""

    def table(self) -> pd.DataFrame:
        """The rows as a DataFrame indexed by run id."""
        import pandas as pd

        return pd.DataFrame(self.rows).set_index("run_id")

    def text(self) -> str:
        """The finding in one sentence."""
        claims = [
            row for row in self.rows if row["speedup"] is not None and not (row["is_baseline"] or row["is_ceiling"])
        ]
        if not claims:
            reasons = sorted({note for row in self.rows for note in row["notes"]}) or [
                "no baseline: run it on one rank"
            ]
            return f"No speed-up can be claimed: {'; '.join(reasons)}."
        # Repeats of one layout count by their median, not by their best.
        layouts: dict[str, list[dict[str, Any]]] = {}
        for row in claims:
            layouts.setdefault(row["layout"], []).append(row)
        typical = [
            sorted(repeats, key=lambda row: row["speedup"])[(len(repeats) - 1) // 2] for repeats in layouts.values()
        ]
        best = max(typical, key=lambda row: row["speedup"])
        repeats = len(layouts[best["layout"]])
        median = f", median of {repeats} runs" if repeats > 1 else ""
        ceiling = f", where the machine allows {best['ceiling']:.2f}" if best["ceiling"] else ""
        return (
            f"{_count(best['world_size'])} {best['speedup']:.2f} times as fast as one "
            f"({best['speedup_low']:.2f} to {best['speedup_high']:.2f}{median}{ceiling}); "
            f"baseline {best['baseline_run_id']}."
        )

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"

    def __str__(self) -> str:
        head = [
            "run",
            "layout",
            "method",
            "state",
            "steps",
            "samples/s",
            "ms/step",
            "speed-up",
            "interval",
            "efficiency",
            "ceiling",
        ]
        metric = next((row["metric"] for row in self.rows if row["metric"]), "metric")
        lines = [[*head, metric]]
        for row in self.rows:
            interval = "" if row["speedup_low"] is None else f"{row['speedup_low']:.2f}-{row['speedup_high']:.2f}"
            mark = " (baseline)" if row["is_baseline"] else " (ceiling)" if row["is_ceiling"] else ""
            lines.append(
                [
                    row["run_id"] + mark,
                    row["layout"],
                    row["method"],
                    row["state"],
                    str(row["steps"]),
                    _number(row["samples_per_second"], ".0f"),
                    _number(row["step_seconds"] and 1000 * row["step_seconds"], ".1f"),
                    _number(row["speedup"], ".2f"),
                    interval,
                    _number(row["efficiency"], ".0%"),
                    _number(row["ceiling"], ".2f"),
                    _number(row["final"], ".4g"),
                ]
            )
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        table.insert(1, "  ".join("-" * width for width in widths))
        notes = [f"{row['run_id']}: {note}" for row in self.rows for note in row["notes"]]
        return "\n".join([*table, "", *notes, self.text()])


def _count(ranks: int) -> str:
    return "1 rank trains" if ranks == 1 else f"{ranks} ranks train"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else formatted(value, form)


def compare(runs: Iterable[Any], baseline: Any = None, skip_unreadable: bool = False) -> Comparison:
    """Compare runs (Run, RunDirectory, id or path). The baseline is the given one, or each run's nearest in time.

    Runs taken in turn (A B A B) are each set against the baseline next to them, because machines drift. Raises
    FileNotFoundError for an unknown run and ExperimentError for one whose experiment cannot be read, e.g. because a
    newer labkit wrote it; with `skip_unreadable` such a run is left out and named in the result.
    """
    directories = {directory.path: directory for directory in map(_directory, runs)}  # each run counts once
    measured, left_out = [], []
    for directory in directories.values():
        try:
            measured.append(RunMeasurement.read(directory))
        except ExperimentError as error:
            if not skip_unreadable:
                raise
            left_out.append(str(error))
    named = None
    if baseline is not None:
        named = RunMeasurement.read(named_baseline(baseline))
        bases = [named]
        if all(one.directory.id != named.directory.id for one in measured):
            measured.insert(0, named)
    else:
        bases = [one for one in measured if one.is_baseline]
    rows = [_row(one, bases, measured, named) for one in measured]
    used = [row["baseline_run_id"] for row in rows if row["baseline_run_id"]]
    return Comparison(rows, max(set(used), key=used.count) if used else None, left_out)


def _directory(run: Any) -> RunDirectory:
    if isinstance(run, RunDirectory):
        return run
    found = getattr(run, "directory", None)
    return found if isinstance(found, RunDirectory) else RunDirectory.find(run)


def _nearest(one: RunMeasurement, others: Sequence[RunMeasurement]) -> RunMeasurement | None:
    return min(others, key=lambda other: abs(other.created - one.created), default=None)


def _row(
    one: RunMeasurement,
    bases: Sequence[RunMeasurement],
    all_runs: Sequence[RunMeasurement],
    named: RunMeasurement | None,
) -> dict[str, Any]:
    experiment, data = one.experiment, one.data
    is_baseline = one.is_baseline if named is None else one.directory.id == named.directory.id
    fitting = [base for base in bases if not differences(one.experiment, base.experiment)]
    base = one if is_baseline else _nearest(one, fitting)
    notes = []
    if base is None and bases:
        notes.append(", ".join(differences(one.experiment, bases[0].experiment)) + " than the baseline")
    speedup = low = high = None
    complaint = one.steady.complaint or (base.steady.complaint if base else None)
    if complaint:
        notes.append(complaint)
    elif base is not None:
        speedup, low, high = (1.0, 1.0, 1.0) if base is one else steady.ratio(base.steady, one.steady)
        if high - low > steady.MAX_RELATIVE_WIDTH * speedup:
            notes.append(f"too noisy to claim ({low:.2f} to {high:.2f})")
            speedup = low = high = None
    ranks = experiment.layout.world_size
    final = data.evaluations[-1][2] if data.evaluations else {}
    metric = data.metric.get("key")
    return {
        "run_id": one.directory.id,
        "title": one.status.get("title") or one.directory.id,
        "workload": experiment.workload.name,
        "layout": str(experiment.layout),
        "method": methods.key(experiment),
        "world_size": ranks,
        "device": experiment.launch.device,
        "state": one.status["state"],
        "global_batch": experiment.training.global_batch,
        "steps": data.steps,
        "metric": metric,
        "final": None if one.is_ceiling else final.get(metric or ""),
        "loss": None if one.is_ceiling else final.get("loss"),
        "samples_per_second": one.samples_per_second,
        "step_seconds": one.steady.median,
        "warmup_steps": one.steady.warmup_steps,
        "speedup": speedup,
        "speedup_low": low,
        "speedup_high": high,
        "efficiency": None if speedup is None or base is None else speedup * base.ranks / ranks,
        "ceiling": _ceiling(one, base, all_runs),
        "baseline_run_id": base.directory.id if base else None,
        "is_baseline": is_baseline,
        "is_ceiling": one.is_ceiling,
        "notes": notes,
    }


def _ceiling(one: RunMeasurement, base: RunMeasurement | None, all_runs: Sequence[RunMeasurement]) -> float | None:
    """What independent copies on as many ranks reach, over the baseline; None if that was not measured."""
    if one.experiment.layout.world_size == 1:
        return None
    candidates = [
        other
        for other in all_runs
        if other.is_ceiling
        and other.experiment.layout.world_size == one.experiment.layout.world_size
        and other.experiment.launch.slowdown == one.experiment.launch.slowdown
        and not differences(other.experiment, one.experiment)
    ]
    ceiling = _nearest(one, candidates)
    if ceiling is None or base is None or not ceiling.steady.median or not base.steady.median:
        return None
    return base.steady.median / ceiling.steady.median
