"""Comparison of runs: speed-up over a baseline, efficiency, and the most that the machine could have given.

Speed-up is throughput ÷ throughput of the baseline: same workload, global batch, seed, precision and threads per rank,
in one process. The ceiling is the same ratio for as many independent copies that run at once on this machine
(`launch.isolated`): it separates the cost of the method from the limits of the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
from labkit.runs.comparison_row import ComparisonRow
from labkit.runs.data import RunData
from labkit.runs.model_flops import CONVENTION, ModelFlops, model_flops_of
from labkit.runs.status import reconcile

if TYPE_CHECKING:
    import pandas as pd

MAX_SEARCHED_RUNS = 300
"""Number of latest runs that are searched for a baseline."""


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
        """Read a run from disk; raise ExperimentError if its experiment cannot be read."""
        data = RunData(directory)
        data.refresh()
        experiment = Experiment.of_run(directory)
        seconds = _step_seconds(data, experiment.launch.isolated)
        return cls(
            directory,
            experiment,
            reconcile(directory),
            data,
            steady.SteadyState.of(seconds, methods.period(experiment), data.disturbed_steps),
        )

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.experiment.layout.world_size

    @property
    def is_ceiling(self) -> bool:
        """True for a run of several independent copies (`launch.isolated`)."""
        return self.experiment.launch.isolated and self.experiment.layout.world_size > 1

    @property
    def is_baseline(self) -> bool:
        """True for a one-process run that has finished or was stopped."""
        return is_one_process(self.experiment) and self.status["state"] in ("finished", "stopped")

    @property
    def samples_per_second(self) -> float | None:
        """Median throughput over all ranks after the warm-up."""
        return self.experiment.training.global_batch / self.steady.median if self.steady.median else None

    @property
    def model_flops(self) -> ModelFlops:
        """Model FLOPs per sample and second, and their share of what the GPUs can do."""
        return model_flops_of(self.data, self.experiment, None if self.steady.reason else self.samples_per_second)

    @property
    def created(self) -> float:
        """When the run was created (s since the epoch); 0 if unknown."""
        return float(self.status.get("created") or 0.0)


def _step_seconds(data: RunData, isolated: bool) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the seconds per step of the run, shape [steps]: the mean over its ranks, which wait for each other.

    Isolated ranks do not wait, so their rates add up and the harmonic mean is taken.
    """
    columns = [seconds for seconds in data.seconds if len(seconds)]
    if not columns:
        return np.empty(0)
    length = min(len(seconds) for seconds in columns)
    table = np.stack([seconds[:length] for seconds in columns]).astype(np.float64)
    if isolated and (table > 0).all():
        return np.asarray(1 / np.mean(1 / table, axis=0))
    return np.asarray(np.mean(table, axis=0))


def differences(a: Experiment, b: Experiment) -> list[str]:
    """Return what makes two experiments incomparable in speed; [] if only the layout and the method differ."""
    pairs = {
        "workload": (a.workload, b.workload),
        "global batch": (a.training.global_batch, b.training.global_batch),
        "seed": (a.training.seed, b.training.seed),
        "precision": tuple(experiment.quantization.model_copy(update={"after_training": ""}) for experiment in (a, b)),
        "optimizer": (a.optimizer, b.optimizer),
        "loader": (a.training.loader_workers, b.training.loader_workers),
        "threads per rank": (a.launch.threads_per_rank, b.launch.threads_per_rank),
        "device": (a.launch.device, b.launch.device),
    }
    return [f"different {name}" for name, (first, second) in pairs.items() if first != second]


def named_baseline(run: Any) -> RunDirectory:
    """Return the directory of the requested baseline.

    Raises ExperimentError if the run cannot be a baseline, FileNotFoundError if it does not exist.
    """
    directory = _directory(run)
    if not is_one_process(Experiment.of_run(directory)):
        reason = (
            f"run {directory.id} is not one process that computes the batch in one pass, so it cannot be a baseline"
        )
        raise ExperimentError([Problem("baseline", reason)])
    return directory


def find_baseline(directory: RunDirectory) -> RunDirectory | None:
    """Return the latest finished one-process run on the same machine that `directory` can be compared with, or None."""
    experiment = Experiment.of_run(directory)
    host = _entry(directory.environment, "host")
    for candidate_directory in list(RunDirectory.all(directory.path.parent.parent))[-MAX_SEARCHED_RUNS:][::-1]:
        if candidate_directory.id == directory.id:
            continue
        try:
            candidate = Experiment.of_run(candidate_directory)
        except ExperimentError:
            continue
        if not is_one_process(candidate) or differences(experiment, candidate):
            continue
        if (
            _entry(candidate_directory.environment, "host") == host
            and _entry(candidate_directory.status, "state") == "finished"
        ):
            return candidate_directory
    return None


def _entry(path: Path, name: str) -> Any:
    """Return an entry of a JSON file in a run directory; None if it is missing."""
    content = read_json(path)
    return content.get(name) if isinstance(content, dict) else None


@dataclass(frozen=True)
class Comparison:
    """Several runs compared. `rows` has one row per run; speed-ups refer to the run `baseline_run_id`."""

    rows: list[ComparisonRow]
    baseline_run_id: str | None
    left_out: list[str] = field(default_factory=list)
    """Why requested runs are missing, one sentence per run that names it."""

    def table(self) -> pd.DataFrame:
        """Return the rows as a DataFrame indexed by run id."""
        import pandas as pd

        return pd.DataFrame([row.as_dict() for row in self.rows]).set_index("run_id")

    def text(self) -> str:
        """Return the result of the comparison in one sentence."""
        claims = [row for row in self.rows if row.speedup is not None and not (row.is_baseline or row.is_ceiling)]
        if not claims:
            reasons = sorted({note for row in self.rows for note in row.notes}) or ["no baseline: run it on one rank"]
            return f"No speed-up can be claimed: {'; '.join(reasons)}."
        # Of repeated runs of a layout the median counts, not the best.
        layouts: dict[str, list[ComparisonRow]] = {}
        for row in claims:
            layouts.setdefault(row.layout, []).append(row)
        typical = [
            sorted(repeats, key=lambda row: row.speedup or 0.0)[(len(repeats) - 1) // 2] for repeats in layouts.values()
        ]
        best = max(typical, key=lambda row: row.speedup or 0.0)
        repeats = len(layouts[best.layout])
        median = f", median of {repeats} runs" if repeats > 1 else ""
        ceiling = f", where the machine allows {best.ceiling:.2f}" if best.ceiling else ""
        return (
            f"{_count(best.world_size)} {best.speedup:.2f} times as fast as one "
            f"({best.speedup_low:.2f} to {best.speedup_high:.2f}{median}{ceiling}); "
            f"baseline {best.baseline_run_id}."
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
        rates = [name for name, figures in _RATES.items() if any(figures(row) != "-" for row in self.rows)]
        head[head.index("ms/step") : head.index("ms/step")] = rates
        metric = next((row.metric for row in self.rows if row.metric), "metric")
        lines = [[*head, metric]]
        for row in self.rows:
            interval = "" if row.speedup_low is None else f"{row.speedup_low:.2f}-{row.speedup_high:.2f}"
            mark = " (baseline)" if row.is_baseline else " (ceiling)" if row.is_ceiling else ""
            lines.append(
                [
                    row.run_id + mark,
                    row.layout,
                    row.method,
                    row.state,
                    str(row.steps),
                    _number(row.samples_per_second, ".0f"),
                    *(_RATES[name](row) for name in rates),
                    _number(row.step_seconds and 1000 * row.step_seconds, ".1f"),
                    _number(row.speedup, ".2f"),
                    interval,
                    _number(row.efficiency, ".0%"),
                    _number(row.ceiling, ".2f"),
                    _number(row.final, ".4g"),
                ]
            )
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        table.insert(1, "  ".join("-" * width for width in widths))
        notes = [f"{row.run_id}: {note}" for row in self.rows for note in row.notes]
        notes += [f"TFLOP/s of {CONVENTION}"] if rates else []
        return "\n".join([*table, "", *notes, self.text()])


def _count(ranks: int) -> str:
    return "1 rank trains" if ranks == 1 else f"{ranks} ranks train"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else formatted(value, form)


_RATES: dict[str, Callable[[ComparisonRow], str]] = {
    "TFLOP/s": lambda row: _number(row.model_flops_per_second and row.model_flops_per_second / 1e12, ".3g"),
    "MFU": lambda row: _number(row.mfu, ".0%"),
}
"""Columns about model FLOPs, shown if any run has them."""


def compare(runs: Iterable[Any], baseline: Any = None, skip_unreadable: bool = False) -> Comparison:
    """Compare runs (Run, RunDirectory, id or path) with `baseline`, or each with the baseline nearest to it in time.

    Nearest in time, because machines drift: alternate the runs (A B A B). Raises FileNotFoundError for an unknown run
    and ExperimentError for one whose experiment cannot be read, e.g. because a newer labkit wrote it; with
    `skip_unreadable` such a run is left out and named in the result.
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
        if all(run.directory.id != named.directory.id for run in measured):
            measured.insert(0, named)
    else:
        bases = [run for run in measured if run.is_baseline]
    rows = [_row(run, bases, measured, named) for run in measured]
    used = [row.baseline_run_id for row in rows if row.baseline_run_id]
    return Comparison(rows, max(set(used), key=used.count) if used else None, left_out)


def _directory(run: Any) -> RunDirectory:
    if isinstance(run, RunDirectory):
        return run
    directory = getattr(run, "directory", None)
    return directory if isinstance(directory, RunDirectory) else RunDirectory.find(run)


def _nearest(run: RunMeasurement, candidates: Sequence[RunMeasurement]) -> RunMeasurement | None:
    return min(candidates, key=lambda candidate: abs(candidate.created - run.created), default=None)


def _row(
    run: RunMeasurement,
    bases: Sequence[RunMeasurement],
    all_runs: Sequence[RunMeasurement],
    named: RunMeasurement | None,
) -> ComparisonRow:
    experiment, data = run.experiment, run.data
    is_baseline = run.is_baseline if named is None else run.directory.id == named.directory.id
    fitting = [base for base in bases if not differences(run.experiment, base.experiment)]
    base = run if is_baseline else _nearest(run, fitting)
    notes = []
    if base is None and bases:
        notes.append(", ".join(differences(run.experiment, bases[0].experiment)) + " than the baseline")
    speedup = low = high = None
    reason = run.steady.reason or (base.steady.reason if base else None)
    if reason:
        notes.append(reason)
    elif base is not None:
        speedup, low, high = (1.0, 1.0, 1.0) if base is run else steady.ratio(base.steady, run.steady)
        if high - low > steady.MAX_RELATIVE_WIDTH * speedup:
            notes.append(f"too noisy to claim ({low:.2f} to {high:.2f})")
            speedup = low = high = None
    ranks = experiment.layout.world_size
    final = data.evaluations[-1][2] if data.evaluations else {}
    metric = data.metric.get("key")
    return ComparisonRow(
        run_id=run.directory.id,
        title=run.status.get("title") or run.directory.id,
        workload=experiment.workload.name,
        layout=str(experiment.layout),
        method=methods.key(experiment),
        world_size=ranks,
        device=experiment.launch.device,
        state=run.status["state"],
        global_batch=experiment.training.global_batch,
        steps=data.steps,
        metric=metric,
        final=None if run.is_ceiling else final.get(metric or ""),
        loss=None if run.is_ceiling else final.get("loss"),
        samples_per_second=run.samples_per_second,
        model_flops_per_second=run.model_flops.per_second,
        mfu=run.model_flops.mfu,
        step_seconds=run.steady.median,
        warmup_steps=run.steady.warmup_steps,
        speedup=speedup,
        speedup_low=low,
        speedup_high=high,
        efficiency=None if speedup is None or base is None else speedup * base.ranks / ranks,
        ceiling=_ceiling(run, base, all_runs),
        baseline_run_id=base.directory.id if base else None,
        is_baseline=is_baseline,
        is_ceiling=run.is_ceiling,
        notes=notes,
    )


def _ceiling(run: RunMeasurement, base: RunMeasurement | None, all_runs: Sequence[RunMeasurement]) -> float | None:
    """Return the speed-up of independent copies on as many ranks over the baseline; None if it was not measured."""
    if run.experiment.layout.world_size == 1:
        return None
    candidates = [
        candidate
        for candidate in all_runs
        if candidate.is_ceiling
        and candidate.experiment.layout.world_size == run.experiment.layout.world_size
        and candidate.experiment.launch.slowdown == run.experiment.launch.slowdown
        and not differences(candidate.experiment, run.experiment)
    ]
    ceiling = _nearest(run, candidates)
    if ceiling is None or base is None or not ceiling.steady.median or not base.steady.median:
        return None
    return base.steady.median / ceiling.steady.median
