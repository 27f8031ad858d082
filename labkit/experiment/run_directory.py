"""The run directory: the only thing that the notebook's side and the ranks' side share.

    $LABKIT_HOME/runs/<id>/          mode 0700; LABKIT_HOME defaults to ~/.labkit
        experiment.json              the resolved experiment
        environment.json             versions, devices, flags, git state
        status.json                  replaced by rename; exactly one terminal state
        progress.json                where every rank is now, replaced about twice a second
        stop.json                    somebody asked the run to stop
        rank-N.jsonl                 one event per line, append-only, one writer each (see events.py)
        gpus.jsonl                   what the GPUs did, written by the supervisor (see gpu_events.py)
        rank-N.log                   what the rank printed, size-capped
        supervisor.log
        .alive                       locked by the supervisor for its life (labkit.runs.liveness); gone after the end
        checkpoints/step-00000100/   safetensors and JSON
        profile/rank-N.json.gz       what torch.profiler recorded of one step (a chrome trace), if that was asked for
        exported.safetensors         the trained network in its fastest form, if that was asked for
        summary.json

JSON and safetensors only: nothing in here is ever unpickled. A reader tolerates an unfinished last line, a missing
rank, and a directory from another machine.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from labkit.experiment import safe_files
from labkit.experiment.safe_files import read_json as read_json
from labkit.experiment.safe_files import write_json as write_json

TERMINAL = ("finished", "stopped", "failed")
STATES = ("starting", "running", "stopping", *TERMINAL)

PHASES = ("setup", "data", "forward", "backward", "optimizer", "evaluation", "checkpoint", "done")
"""Phases of a rank, in the order in which it reaches them."""

SLOW_PHASES = ("setup", "checkpoint")
"""Phases in which a rank may be silent for SLOW_FACTOR times launch.timeout_s.

The setup reads data and may compile, and a checkpoint writes many gigabytes of weights and moments between two
heartbeats.
"""
SLOW_FACTOR = 10

EXIT_STOPPED = 75
"""Exit code of a rank that ended early because it was asked to (EX_TEMPFAIL: the run can be resumed)."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}")
_CHECKPOINT = re.compile(r"step-([0-9]{1,12})", re.ASCII)


def home() -> Path:
    """Return the directory that contains all runs, from LABKIT_HOME or ~/.labkit (not created here).

    A relative LABKIT_HOME is resolved against the current folder when labkit is first used: the variable is made
    absolute then, so that later changes of folder do not matter and processes started later find the same runs.
    """
    given = os.environ.get("LABKIT_HOME")
    if not given:
        return Path("~/.labkit").expanduser().absolute()
    path = Path(given).expanduser()
    if not path.is_absolute():
        path = path.absolute()
        os.environ["LABKIT_HOME"] = str(path)
    return path


def standby_log(root: Path) -> Path:
    """Return the path of the log of the standby launchers of this home."""
    return root / "standby.log"


@dataclass(frozen=True)
class RunDirectory:
    """Paths of all files of a run; the only class that defines their names."""

    path: Path

    @classmethod
    def create(cls, slug: str, root: Path | None = None) -> RunDirectory:
        """Make a new directory with a readable id such as `20261123-0412-vision-dp2`; OSError if that is impossible."""
        runs = (root or home()) / "runs"
        for folder in (runs.parent, runs):  # `mode` applies to the last folder only
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        slug = re.sub(r"[^a-z0-9]+", "-", slug.lower()).strip("-")[:60] or "run"
        base = time.strftime("%Y%m%d-%H%M-") + slug
        for attempt in range(1, 10_000):
            path = runs / (base if attempt == 1 else f"{base}-{attempt}")
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o700)
                return cls(path)
        raise OSError(errno.EEXIST, "too many runs of that name this minute", str(runs / base))

    @classmethod
    def find(cls, reference: str | os.PathLike[str], root: Path | None = None) -> RunDirectory:
        """Return the directory of a run id, of `last`, or at a path; FileNotFoundError (one sentence) if missing."""
        text = os.fspath(reference)
        runs = (root or home()) / "runs"
        if text == "last":
            existing = list(cls.all(root))
            if existing:
                return existing[-1]
            raise FileNotFoundError(f"there is no run in {runs} yet")
        if os.sep in text:
            directory = cls(Path(text).expanduser().absolute())
        elif _ID.fullmatch(text):
            directory = cls(runs / text)
        else:
            raise FileNotFoundError(f"{text!r} is not a run id")
        if not safe_files.is_regular(directory.experiment):
            where = f"at {directory.path}" if os.sep in text else f"{text!r} in {runs}"
            raise FileNotFoundError(f"there is no run {where}")
        return directory

    @classmethod
    def all(cls, root: Path | None = None) -> Iterator[RunDirectory]:
        """Yield all runs, oldest first."""
        runs = (root or home()) / "runs"
        try:
            paths = [runs / name for name in os.listdir(runs)]
        except (FileNotFoundError, NotADirectoryError):
            return
        visible = [path for path in paths if safe_files.is_regular(path / "experiment.json")]
        yield from (cls(path) for path in sorted(visible, key=lambda path: (_written_at(path), path.name)))

    def make_latest(self) -> None:
        """Make this the latest run of its home, even if the clock was set back since an earlier one.

        Runs are ordered by the modification time of their experiment.json; that of this run, once written, is moved
        after all others if it is not the latest already.
        """
        other_times = (_written_at(run.path) for run in self.all(self.path.parent.parent) if run.path != self.path)
        latest = max(other_times, default=0)
        if _written_at(self.path) <= latest:
            with contextlib.suppress(OSError):
                os.utime(self.experiment, ns=(latest + 1000, latest + 1000), follow_symlinks=False)

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def experiment(self) -> Path:
        return self.path / "experiment.json"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def progress(self) -> Path:
        return self.path / "progress.json"

    @property
    def stop(self) -> Path:
        return self.path / "stop.json"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def exported(self) -> Path:
        """File with the trained network in its fastest form, read by labkit.sparsity.export."""
        return self.path / "exported.safetensors"

    @property
    def profiles(self) -> Path:
        """Folder of what torch.profiler recorded of one step."""
        return self.path / "profile"

    def profile(self, rank: int) -> Path:
        """Return the path of a rank's profile: a chrome trace, compressed with gzip."""
        return self.profiles / f"rank-{rank}.json.gz"

    @property
    def supervisor_log(self) -> Path:
        return self.path / "supervisor.log"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    @property
    def alive(self) -> Path:
        """File that the supervisor locks for as long as it lives (labkit.runs.liveness)."""
        return self.path / ".alive"

    @property
    def reserve(self) -> Path:
        """File with blocks set aside so that the last status can be written on a full disk."""
        return self.path / ".reserve"

    @property
    def gpus(self) -> Path:
        """Events of the monitor of the GPUs (labkit.launch.gpu_monitor)."""
        return self.path / "gpus.jsonl"

    def events(self, rank: int) -> Path:
        return self.path / f"rank-{rank}.jsonl"

    def log(self, rank: int) -> Path:
        return self.path / f"rank-{rank}.log"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    def checkpoint_steps(self) -> list[int]:
        """Return the steps after which there is a complete checkpoint, ascending; other names and links are ignored."""
        return [step for step in self._checkpoint_folders() if self._has_manifest(step)]

    def checkpoints_without_manifest(self) -> list[int]:
        """Return the steps whose checkpoint lacks its manifest, ascending: something outside of labkit removed it."""
        return [step for step in self._checkpoint_folders() if not self._has_manifest(step)]

    def _checkpoint_folders(self) -> list[int]:
        try:
            names = os.listdir(self.checkpoints) if safe_files.is_folder(self.checkpoints) else []
        except OSError:
            return []
        steps = {int(match[1]) for match in map(_CHECKPOINT.fullmatch, names) if match}
        return sorted(step for step in steps if safe_files.is_folder(self.checkpoint(step)))

    def _has_manifest(self, step: int) -> bool:
        return safe_files.is_regular(self.checkpoint(step) / "checkpoint.json")

    def remove_partial_checkpoints(self) -> None:
        """Remove checkpoints that were being written when their rank ended; called when no rank is left."""
        if safe_files.is_folder(self.checkpoints):
            for path in self.checkpoints.glob(".step-*.partial"):
                safe_files.remove_folder(path)


def _written_at(path: Path) -> int:
    """Return when the run's experiment.json was written (ns)."""
    return safe_files.modified_ns(path / "experiment.json")


with contextlib.suppress(OSError, RuntimeError):  # the current folder may be gone; code that needs it raises then
    home()  # before the current folder can change: see its docstring
