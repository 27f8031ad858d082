"""A run as a figure shows it: its numbers, its name in the legend, and its part in a comparison."""

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
    """Its name in the legend: plain text, not yet escaped."""
    data: RunData
    experiment: Experiment | None = None
    """What was run, None if that cannot be read."""

    @property
    def world_size(self) -> int:
        return self.data.world_size

    @property
    def is_ceiling(self) -> bool:
        """Independent copies, not a training run."""
        return bool(self.experiment and self.experiment.launch.isolated and self.world_size > 1)

    @classmethod
    def of(cls, run: Any) -> LabeledRun:
        """From a Run, a RunData (as far as it has been read), a RunDirectory, a run id or a path."""
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
        """With the title that the run gives itself, and its method and link where they are not the usual ones."""
        title = data.status.get("title") or (experiment.title if experiment else "") or data.directory.id
        if experiment is not None and not experiment.name:
            title = ", ".join([str(title), *wording.method(experiment), *wording.link(experiment)])
        isolated = bool(experiment and experiment.launch.isolated)
        return cls(label(theme.plain(title, 60), data.world_size, isolated), data, experiment)


def label(title: str, ranks: int, isolated: bool) -> str:
    """`vision dp2 (2 ranks)`; one rank is where comparisons start, copies that never talk are where they end."""
    if isolated and ranks > 1:
        return f"{title} ({ranks} independent copies)"
    return f"{title} ({theme.ranks(ranks)})"


def shown(runs: Iterable[Any] | Any) -> list[LabeledRun]:
    """One or several runs, ready to draw; equal labels are numbered."""
    if isinstance(runs, str) or not isinstance(runs, Iterable):
        runs = [runs]
    result: list[LabeledRun] = []
    seen: dict[str, int] = {}
    for run in runs:
        one = LabeledRun.of(run)
        count = seen[one.label] = seen.get(one.label, 0) + 1
        result.append(one if count == 1 else LabeledRun(f"{one.label} #{count}", one.data, one.experiment))
    return result
