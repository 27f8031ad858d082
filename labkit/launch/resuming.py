"""Resuming another run, the client side: what is refused before anything is launched, and what the new run keeps.

The checkpoint also becomes a checkpoint of the new run, by hard links: the run that wrote it may continue and remove
it, or be deleted, and a new run that ends before its first checkpoint can be resumed itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from labkit.experiment import Experiment, ExperimentError, Problem, checkpoint_files, safe_files
from labkit.experiment.checkpoint_files import DamagedError, Manifest
from labkit.experiment.resume import notes
from labkit.experiment.run_directory import RunDirectory
from labkit.runs.run import Run

MAX_VERIFIED_BYTES = 256 * 2**20
"""A larger checkpoint is not verified before the launch, which must return at once, but by the ranks."""
FIXED_FIELDS = ("workload.name", "training.seed", "training.global_batch", "optimizer.name")


class VanishedError(Exception):
    """The checkpoint was removed by the run that wrote it, which is still training; there may be a later one."""


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a run starts from."""

    folder: Path
    contents: Manifest
    notes: list[str]
    """Sentences for the user: changed settings, and what is not resumed exactly."""

    def link_into(self, directory: RunDirectory) -> Path:
        """Make it a checkpoint of the new run and return its folder there. OSError or VanishedError if it cannot be."""
        target = directory.checkpoint(self.contents.step)
        try:
            checkpoint_files.link_checkpoint(self.folder, self.contents, target)
        except FileNotFoundError:
            raise VanishedError from None
        return target


def find_resume_point(run: Run | str, experiment: Experiment) -> ResumePoint:
    """Return the last checkpoint of a run from which `experiment` can continue.

    ExperimentError (one sentence) if there is none, it is damaged, or it belongs to another training. VanishedError if
    it was removed meanwhile.
    """
    try:
        run = Run.attach(run) if isinstance(run, str) else run
    except FileNotFoundError as error:
        raise ExperimentError([Problem("resume", str(error))]) from None
    steps = run.checkpoints()
    if not steps:
        damaged = run.directory.checkpoints_without_manifest()
        why = f" with its {checkpoint_files.MANIFEST}" if damaged else " (set training.checkpoint_every)"
        raise ExperimentError([Problem("resume", f"run {run.id} has no checkpoint{why}")])
    folder = run.directory.checkpoint(steps[-1])
    try:
        contents = checkpoint_files.read_manifest(folder)
        if sum(file.size for file in contents.files.values()) <= MAX_VERIFIED_BYTES:
            checkpoint_files.verify(folder, contents, contents.files)
        previous = Experiment.from_dict(contents.experiment)
    except ExperimentError as error:
        reasons = "; ".join(str(problem) for problem in error.problems)
        reason = f"the experiment in the checkpoint {folder.name} cannot be read: {reasons}"
        raise ExperimentError([Problem("resume", reason)]) from None
    except (DamagedError, OSError) as error:
        if not safe_files.is_regular(folder / checkpoint_files.MANIFEST):
            raise VanishedError from None
        raise ExperimentError([Problem("resume", str(error))]) from None
    _refuse_other_training(previous, experiment, contents.step)
    return ResumePoint(folder, contents, [*_skipped(run, steps[-1]), *notes(previous, experiment, contents)])


def _skipped(run: Run, step: int) -> list[str]:
    """Return a sentence if the run has a later checkpoint than that of `step` which cannot be used."""
    later = [other for other in run.directory.checkpoints_without_manifest() if other > step]
    if not later:
        return []
    folder = run.directory.checkpoint(later[-1]).name
    return [f"it was resumed from step {step:,}, because {folder} has no {checkpoint_files.MANIFEST}"]


def _refuse_other_training(previous: Experiment, experiment: Experiment, step: int) -> None:
    """Raise ExperimentError if samples or weights would differ; another layout or number of steps is fine."""
    changed = [
        Problem(field, f"was {previous.get(field)} in the run to resume and must stay the same", previous.get(field))
        for field in FIXED_FIELDS
        if previous.get(field) != experiment.get(field)
    ]
    if not changed and previous.workload != experiment.workload:
        changed = [Problem("workload", "its options differ from those of the run to resume and must stay the same")]
    steps = experiment.training.steps
    if steps is not None and steps <= step:
        changed.append(Problem("training.steps", f"{step} steps are done already, so none are left", step + 1))
    if changed:
        raise ExperimentError(changed)


def checkpoints_vanish_error(run: Run | str) -> ExperimentError:
    """Return the error for a run that removes its checkpoints faster than they can be linked."""
    name = run if isinstance(run, str) else run.id
    reason = f"run {name} is still training and removes its checkpoints faster than they can be linked; stop it first"
    return ExperimentError([Problem("resume", reason)])
