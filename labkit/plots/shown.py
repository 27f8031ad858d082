"""A run in a figure: its data, its label in the legend, and its role in a comparison."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from labkit.experiment import Experiment, ExperimentError
from labkit.experiment.run_directory import RunDirectory
from labkit.plots import theme, wording
from labkit.runs.data import RunData


@dataclass(frozen=True)
class LabeledRun:
    """One run in a figure."""

    label: str
    """Name in the legend: plain text, not yet escaped."""
    data: RunData
    experiment: Experiment | None = None
    """The experiment of the run; None if it cannot be read."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.data.world_size

    @property
    def is_ceiling(self) -> bool:
        """True for a run of several independent copies (`launch.isolated`) instead of a training run."""
        return bool(self.experiment and self.experiment.launch.isolated and self.world_size > 1)

    @classmethod
    def of(cls, run: Any) -> LabeledRun:
        """Label a Run, a RunData (as far as it has been read), a RunDirectory, a run id or a path."""
        if isinstance(run, cls):
            return run
        if isinstance(run, RunData):
            data = run
        else:
            directory = run if isinstance(run, RunDirectory) else getattr(run, "directory", None)
            data = RunData(directory if isinstance(directory, RunDirectory) else RunDirectory.find(run))
            data.refresh()
        try:
            experiment = Experiment.of_run(data.directory)
        except ExperimentError:
            experiment = None
        return cls.named(data, experiment)

    @classmethod
    def named(cls, data: RunData, experiment: Experiment | None) -> LabeledRun:
        """Label a run with its own title, and with its method and link if they are not the default."""
        title = data.status.get("title") or (experiment.title if experiment else "") or data.directory.id
        if experiment is not None and not experiment.name:
            title = ", ".join([str(title), *wording.method(experiment), *wording.link(experiment)])
        isolated = bool(experiment and experiment.launch.isolated)
        return cls(label(theme.plain(title, 60), data.world_size, isolated), data, experiment)


def label(title: str, ranks: int, isolated: bool) -> str:
    """Return the label: `vision dp2 (2 ranks)`, or `vision dp2 (2 independent copies)` for an isolated run."""
    if isolated and ranks > 1:
        return f"{title} ({ranks} independent copies)"
    return f"{title} ({theme.ranks(ranks)})"


def labeled_runs(runs: Iterable[Any] | Any) -> list[LabeledRun]:
    """Return one or several runs with their labels; equal labels are numbered."""
    if isinstance(runs, str) or not isinstance(runs, Iterable):
        runs = [runs]
    result: list[LabeledRun] = []
    counts: dict[str, int] = {}
    for run in runs:
        labeled_run = LabeledRun.of(run)
        count = counts[labeled_run.label] = counts.get(labeled_run.label, 0) + 1
        result.append(
            labeled_run
            if count == 1
            else LabeledRun(f"{labeled_run.label} #{count}", labeled_run.data, labeled_run.experiment)
        )
    return result
