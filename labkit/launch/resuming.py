"""Going on from another run, the launching side: what is refused before anything is launched, and what is kept.

The checkpoint also becomes one of the new run's own, by hard links: so the run that wrote it may go on and remove it,
or be deleted, and a new run that ends before its first checkpoint can be gone on with itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from labkit.experiment import Experiment, ExperimentError, Problem, checkpoint_files, safe_files
from labkit.experiment.checkpoint_files import Contents, DamagedError
from labkit.experiment.resume import notes
from labkit.experiment.run_directory import RunDirectory
from labkit.runs.run import Run

MOST_VERIFIED_BYTES = 256 * 2**20
"""A larger checkpoint is not read before the launch, which has to return at once: its ranks verify it themselves."""
MUST_STAY = ("workload.name", "training.seed", "training.global_batch", "optimizer.name")


class VanishedError(Exception):
    """The checkpoint was removed by the run that wrote it, which goes on; there may be a later one."""


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run begins with."""

    folder: Path
    contents: Contents
    notes: list[str]
    """What there is to say about it: changed settings, what is not exact."""

    def take_along(self, directory: RunDirectory) -> Path:
        """Make it a checkpoint of the new run and return its folder there; OSError, VanishedError."""
        target = directory.checkpoint(self.contents.step)
        try:
            checkpoint_files.take_along(self.folder, self.contents, target)
        except FileNotFoundError:
            raise VanishedError from None
        return target


def find_start(run: Run | str, experiment: Experiment) -> Start:
    """The last checkpoint of a run, fit for `experiment`.

    ExperimentError (one sentence) if there is none, it is damaged, or it belongs to another training. VanishedError if
    it was removed meanwhile.
    """
    try:
        run = Run.attach(run) if isinstance(run, str) else run
    except FileNotFoundError as error:
        raise ExperimentError([Problem("resume", str(error))]) from None
    steps = run.checkpoints()
    if not steps:
        raise ExperimentError([Problem("resume", f"run {run.id} has no checkpoint (set training.checkpoint_every)")])
    folder = run.directory.checkpoint(steps[-1])
    try:
        contents = checkpoint_files.read_list(folder)
        if sum(one.size for one in contents.files.values()) <= MOST_VERIFIED_BYTES:
            checkpoint_files.verify(folder, contents, contents.files)
        before = Experiment.from_dict(contents.experiment)
    except ExperimentError as error:
        why = "; ".join(str(problem) for problem in error.problems)
        reason = f"the experiment in the checkpoint {folder.name} cannot be read: {why}"
        raise ExperimentError([Problem("resume", reason)]) from None
    except (DamagedError, OSError) as error:
        if not safe_files.is_regular(folder / checkpoint_files.LIST):
            raise VanishedError from None
        raise ExperimentError([Problem("resume", str(error))]) from None
    _refuse_other_training(before, experiment, contents.step)
    return Start(folder, contents, notes(before, experiment, contents))


def _refuse_other_training(before: Experiment, experiment: Experiment, step: int) -> None:
    """A resumed run continues the same training: another layout or length is fine, other samples or weights are not."""
    changed = [
        Problem(field, f"was {before.get(field)} in the run to resume and must stay so", before.get(field))
        for field in MUST_STAY
        if before.get(field) != experiment.get(field)
    ]
    if not changed and before.workload != experiment.workload:
        changed = [Problem("workload", "its options were others in the run to resume and must stay so")]
    steps = experiment.training.steps
    if steps is not None and steps <= step:
        changed.append(Problem("training.steps", f"{step} steps are done already, so there is nothing left", step + 1))
    if changed:
        raise ExperimentError(changed)


def gone(run: Run | str) -> ExperimentError:
    """Why a run that removes its checkpoints faster than they can be linked cannot be resumed now."""
    name = run if isinstance(run, str) else run.id
    reason = f"run {name} goes on and removes its checkpoints faster than they can be taken along; stop it first"
    return ExperimentError([Problem("resume", reason)])
