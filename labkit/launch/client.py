"""The client side, in a notebook kernel or a command: it writes the run directory, sends the order and returns at once.

The kernel never forks, makes no CUDA calls and changes no signal handlers. It holds a pipe to one standby (standby.py).
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from labkit.experiment import Experiment, ExperimentError, Problem, safe_files
from labkit.experiment.run_directory import RunDirectory, home, standby_log, write_json
from labkit.launch import resuming
from labkit.runs import logs
from labkit.runs import status as run_status
from labkit.runs.processes import boot_id, frozen, identity, machine
from labkit.runs.run import Run

MIN_FREE_BYTES = 2 * 2**20
RESUME_TRIES = 5
"""How often to look for a later checkpoint if a run that is still training has just removed the previous one."""
# Set before numpy and torch create their thread pools in the standby: a thread pool would not survive the fork.
SINGLE_THREADED = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
}
# Prefixes of variables that a run sees as they are at its launch, not as they were when the standby started.
FORWARDED_PREFIXES = ("CUDA_", "NCCL_", "GLOO_", "HF_", "LABKIT_", "TORCH_")


class Standby:
    """A standby process and the pipe to it."""

    def __init__(self) -> None:
        self._stdout: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the standby)
        log = _open_log()
        self.process = subprocess.Popen(
            # -P: a file in the current folder must not stand in for a library.
            [sys.executable, "-P", "-m", "labkit.launch.standby"],
            stdin=subprocess.PIPE,
            stdout=self._stdout,
            stderr=log,
            start_new_session=True,  # the interrupt of a notebook goes to the kernel's whole process group
            env=os.environ | SINGLE_THREADED | import_path(),
        )
        log.close()

    @property
    def alive(self) -> bool:
        """Whether the process has not ended."""
        return self.process.poll() is None

    @property
    def takes_orders(self) -> bool:
        """Whether it is alive and not stopped by a signal; a stopped one would never begin a run."""
        return self.alive and not frozen(self.process.pid)

    def ready(self) -> bool:
        """Return whether it has imported everything that ranks need."""
        return not self._stdout.closed and self.alive and b'"ready"' in os.pread(self._stdout.fileno(), 1 << 12, 0)

    def order(self, order: dict[str, Any]) -> None:
        """Send one order. OSError if the standby is gone."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()

    def close(self) -> None:
        """Close the pipe, so that the standby ends; runs that it has started continue."""
        self._stdout.close()
        if self.process.stdin is not None and not self.process.stdin.closed:
            with contextlib.suppress(OSError):  # it ended before it could read the last order
                self.process.stdin.close()


def import_path() -> dict[str, str]:
    """Return the PYTHONPATH variable with which a Python process that ignores the current folder finds this labkit.

    It is only needed if labkit is imported from a folder that is searched by this process alone, as in a checkout;
    otherwise the result is empty.
    """
    root = str(Path(__file__).resolve().parents[2])
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()}
    searched = {str(Path(entry or os.curdir).resolve()) for entry in sys.path}
    if root in installed or root not in searched:
        return {}
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {} if root in paths else {"PYTHONPATH": os.pathsep.join([*paths, root])}


def _open_log() -> IO[bytes]:
    """Open the log for errors of standbys, e.g. that torch cannot be imported; failed runs quote its end."""
    path = standby_log(home())
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        logs.cap(path)
        return os.fdopen(safe_files.open_to_append(path), "ab")
    except OSError:
        return open(os.devnull, "ab")


_lock = threading.Lock()
_standby: Standby | None = None
_closing: list[Standby] = []
"""Standbys whose pipe was closed but that have not ended: kept so that they are reaped and leave no zombies."""


def _current_standby() -> Standby:
    """Return the living standby of this process, and start one if necessary. Call with the lock held."""
    global _standby
    if _standby is not None and not _standby.takes_orders:
        if _standby.alive:  # stopped: the runs ordered from it fail with that reason, later ones get a new standby
            _standby.process.kill()
        _release(_standby)
        _standby = None
    if _standby is None:
        _standby = Standby()
    return _standby


def _release(standby: Standby) -> None:
    """Close a standby and reap those that have ended. Call with the lock held."""
    standby.close()
    _closing[:] = [candidate for candidate in (*_closing, standby) if candidate.alive]


def uses_standby() -> bool:
    """Return whether a standby is used; LABKIT_STANDBY=0 turns it off to save memory, and each run then starts cold."""
    return os.environ.get("LABKIT_STANDBY", "1") != "0"


def warm(wait: float = 0.0) -> bool:
    """Start the standby in the background, wait up to `wait` seconds for it, and return whether it is ready."""
    if not uses_standby():
        return False
    with _lock:
        standby = _current_standby()
    deadline = time.monotonic() + wait
    while not standby.ready() and standby.alive and time.monotonic() < deadline:
        time.sleep(0.02)
    return standby.ready()


@contextlib.contextmanager
def private_standby() -> Iterator[None]:
    """Launch the runs of this context from another standby, with its own random state and its own order of sets."""
    previous = _swap_standby(None)
    try:
        yield
    finally:
        private = _swap_standby(previous)
        if private is not None:
            with _lock:
                _release(private)


def _swap_standby(standby: Standby | None) -> Standby | None:
    """Use this standby for launches from now on, and return the previous one."""
    global _standby
    with _lock:
        previous, _standby = _standby, standby
    return previous


def standby_pid() -> int | None:
    """Return the process id of the standby, or None if there is none."""
    with _lock:
        return _standby.process.pid if _standby is not None and _standby.alive else None


@atexit.register
def close() -> None:
    """End the standby of this process; runs continue."""
    global _standby
    with _lock:
        if _standby is not None:
            _release(_standby)
            _standby = None


def launch(
    experiment: Experiment,
    *,
    resume: Run | str | None = None,
    baseline: Run | str | None = "auto",
    entry: str | None = None,
) -> Run:
    """Start a run in the background and return its handle at once.

    `resume` continues from the last checkpoint of another run. `baseline` names the one-process run that the speed-up
    refers to; "auto" uses the latest matching run on this machine. `entry` is what the ranks execute instead of
    training (`module:function`). Raises ExperimentError, and launches nothing, if the experiment cannot run here or the
    run directory cannot be written.
    """
    requested = time.monotonic()
    resolved = experiment.check()
    working_directory = _working_directory()
    directory, resume_point = _prepare(resolved, resume)
    order = {
        "run": str(directory.path),
        "requested": requested,
        "cwd": working_directory,
        "environment": {name: value for name, value in os.environ.items() if name.startswith(FORWARDED_PREFIXES)},
        "baseline": baseline.id if isinstance(baseline, Run) else baseline,
        "resume": None if resume_point is None else str(directory.checkpoint(resume_point.contents.step)),
    } | ({} if entry is None else {"entry": entry})
    try:
        with _lock:
            standby = _current_standby() if uses_standby() else Standby()
            run_status.update(directory, launcher=identity(standby.process.pid))
            standby.order(order)
            if not uses_standby():
                _release(standby)
    except BaseException as error:
        # The run is visible, so it must end: also if its order was sent and an interrupt arrives here.
        message = f"cannot launch: {error}" if isinstance(error, OSError) else "the launch was interrupted"
        with contextlib.suppress(OSError):
            run_status.update(directory, state="failed", cause=run_status.cause("supervisor", message))
        if not isinstance(error, OSError):
            raise
    return Run(directory)


def _first_status(
    directory: RunDirectory, experiment: Experiment, resume_point: resuming.ResumePoint | None
) -> dict[str, Any]:
    """Return the initial status of a run that this process is about to launch."""
    notes = resume_point.notes if resume_point is not None else []
    return {
        "run_id": directory.id,
        "title": experiment.title,
        "state": "starting",
        "created": time.time(),
        "started": None,
        "ended": None,
        "boot": boot_id(),
        "machine": machine(),
        "workload": experiment.workload.name,
        "layout": str(experiment.layout),
        "world_size": experiment.layout.world_size,
        "device": experiment.launch.device,
        "steps": experiment.training.steps,
        "warnings": [*(str(warning) for warning in experiment.warnings()), *notes],
        "notes": notes,
        "resumed_from": None if resume_point is None else str(resume_point.folder),
        "launcher": identity(os.getpid()),
        "supervisor": None,
        "ranks": [],
        "cause": None,
    }


def _working_directory() -> str:
    """Return the current directory. ExperimentError if it has been deleted."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        raise ExperimentError([Problem("", "the current directory has been deleted; change to another one")]) from None


def _prepare(experiment: Experiment, resume: Run | str | None) -> tuple[RunDirectory, resuming.ResumePoint | None]:
    """Create the run directory; return it and the checkpoint to resume from, if any. ExperimentError as in `launch`."""
    if resume is None:
        return _create_directory(experiment), None
    for _ in range(RESUME_TRIES):
        with contextlib.suppress(resuming.VanishedError):
            resume_point = resuming.find_resume_point(resume, experiment)
            return _create_directory(experiment, resume_point), resume_point
    raise resuming.checkpoints_vanish_error(resume)


def _create_directory(experiment: Experiment, resume_point: resuming.ResumePoint | None = None) -> RunDirectory:
    """Create the run directory with the experiment in it. ExperimentError if it cannot be written."""
    directory = None
    try:
        directory = RunDirectory.create(f"{experiment.workload.name}-{experiment.layout}")
        free = shutil.disk_usage(directory.path).free
        if free < MIN_FREE_BYTES:
            directory.path.rmdir()
            raise ExperimentError([Problem("LABKIT_HOME", f"only {free / 2**20:.1f} MB are free in {home()}")])
        run_status.reserve(directory)
        # The experiment makes the run visible, so it comes last.
        run_status.update(directory, **_first_status(directory, experiment, resume_point))
        if resume_point is not None:
            resume_point.link_into(directory)
        write_json(directory.experiment, experiment.to_dict())
        directory.make_latest()
    except (OSError, resuming.VanishedError) as error:
        if directory is not None:
            safe_files.remove_folder(directory.path)
        if not isinstance(error, OSError):
            raise
        reason = error.strerror or str(error)
        raise ExperimentError([Problem("LABKIT_HOME", f"cannot write a run to {home()}: {reason}")]) from None
    return directory
