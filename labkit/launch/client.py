"""The launching side, in a notebook kernel or a command: writes the run directory, sends the order, returns at once.

The kernel never forks, makes no CUDA call and changes no signal handler. It holds a pipe to one standby (standby.py).
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import subprocess
import sys
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

LEAST_FREE_BYTES = 2 * 2**20
RESUME_TRIES = 5
"""How often a later checkpoint is taken when a run that goes on has just removed the one before."""
# In force before numpy and torch load their thread pools in the standby: a thread pool would not survive the fork.
SINGLE_THREADED = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
}
# What a run should see as it is now, not as it was when the standby started.
PASSED_ON = ("CUDA_", "NCCL_", "GLOO_", "HF_", "LABKIT_", "TORCH_")


class Standby:
    """A standby process and the pipe to it."""

    def __init__(self) -> None:
        self._says: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the standby)
        log = _open_log()
        self.process = subprocess.Popen(
            # -P: a file in the current folder must not stand in for a library.
            [sys.executable, "-P", "-m", "labkit.launch.standby"],
            stdin=subprocess.PIPE,
            stdout=self._says,
            stderr=log,
            start_new_session=True,  # the interrupt of a notebook goes to the kernel's whole process group
            env=os.environ | SINGLE_THREADED | import_path(),
        )
        log.close()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def takes_orders(self) -> bool:
        """Is it alive, and not stopped by a signal? A frozen one would never begin a run."""
        return self.alive and not frozen(self.process.pid)

    def ready(self) -> bool:
        """Has it imported everything?"""
        return not self._says.closed and self.alive and b'"ready"' in os.pread(self._says.fileno(), 1 << 12, 0)

    def order(self, order: dict[str, Any]) -> None:
        """Send one order; OSError if the standby is gone."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()

    def close(self) -> None:
        """Let it go; runs that it has started go on."""
        self._says.close()
        if self.process.stdin is not None and not self.process.stdin.closed:
            with contextlib.suppress(OSError):  # it was gone before it could take the last order
                self.process.stdin.close()


def import_path() -> dict[str, str]:
    """What lets a Python process find this labkit without looking into the current folder; empty where it does.

    Only where labkit itself is imported from the current folder, as in a checkout, the process is told of that folder.
    """
    root = str(Path(__file__).resolve().parents[2])
    if not sys.path or Path(sys.path[0] or os.curdir).resolve() != Path(root):
        return {}
    known = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {} if root in known else {"PYTHONPATH": os.pathsep.join([*known, root])}


def _open_log() -> IO[bytes]:
    """Where standbys complain, e.g. that torch cannot be imported; a run that dies so shows the end of it."""
    path = standby_log(home())
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        logs.cap(path)
        return os.fdopen(safe_files.open_to_append(path), "ab")
    except OSError:
        return open(os.devnull, "ab")


_lock = threading.Lock()
_standby: Standby | None = None
_leaving: list[Standby] = []
"""Let go, but not ended yet: kept so that their exit codes are fetched and no zombie stays."""


def _current() -> Standby:
    """The living standby of this process, started if need be. Call with the lock held."""
    global _standby
    if _standby is not None and not _standby.takes_orders:
        if _standby.alive:  # frozen: its orders fail by name, later ones go to another
            _standby.process.kill()
        _let_go(_standby)
        _standby = None
    if _standby is None:
        _standby = Standby()
    return _standby


def _let_go(standby: Standby) -> None:
    """Call with the lock held."""
    standby.close()
    _leaving[:] = [one for one in (*_leaving, standby) if one.alive]


def uses_standby() -> bool:
    """LABKIT_STANDBY=0 turns the waiting process off where memory is short; each run then starts cold."""
    return os.environ.get("LABKIT_STANDBY", "1") != "0"


def warm(wait: float = 0.0) -> bool:
    """Start the standby in the background; with `wait` seconds, wait for it. True if it is ready."""
    if not uses_standby():
        return False
    with _lock:
        standby = _current()
    deadline = time.monotonic() + wait
    while not standby.ready() and standby.alive and time.monotonic() < deadline:
        time.sleep(0.02)
    return standby.ready()


@contextlib.contextmanager
def standby_of_its_own() -> Iterator[None]:
    """Runs launched meanwhile come from another standby: they share neither random state nor the order of sets."""
    before = _exchange_standby(None)
    try:
        yield
    finally:
        own = _exchange_standby(before)
        if own is not None:
            with _lock:
                _let_go(own)


def _exchange_standby(standby: Standby | None) -> Standby | None:
    """Use this standby for launches from here on, and return the one that was used before."""
    global _standby
    with _lock:
        before, _standby = _standby, standby
    return before


def standby_pid() -> int | None:
    """Process id of the standby, or None if there is none."""
    with _lock:
        return _standby.process.pid if _standby is not None and _standby.alive else None


@atexit.register
def close() -> None:
    """End the standby of this process. Runs go on."""
    global _standby
    with _lock:
        if _standby is not None:
            _let_go(_standby)
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
    refers to; "auto" takes the latest on this machine that fits. `entry` is what the ranks do instead of training
    (`module:function`). Raises ExperimentError, and launches nothing, if the
    experiment cannot run here or the run directory cannot be written.
    """
    requested = time.monotonic()
    resolved = experiment.check()
    here = _working_directory()
    directory, start = _prepare(resolved, resume)
    order = {
        "run": str(directory.path),
        "requested": requested,
        "cwd": here,
        "environment": {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)},
        "baseline": baseline.id if isinstance(baseline, Run) else baseline,
        "resume": None if start is None else str(directory.checkpoint(start.contents.step)),
    } | ({} if entry is None else {"entry": entry})
    try:
        with _lock:
            standby = _current() if uses_standby() else Standby()
            run_status.update(directory, launcher=identity(standby.process.pid))
            standby.order(order)
            if not uses_standby():
                _let_go(standby)
    except BaseException as error:
        # The run is visible, so it ends: also one that has got the order and is broken off here (an interrupt).
        broken = f"cannot launch: {error}" if isinstance(error, OSError) else "the launch was broken off"
        with contextlib.suppress(OSError):
            run_status.update(directory, state="failed", cause=run_status.cause("supervisor", broken))
        if not isinstance(error, OSError):
            raise
    return Run(directory)


def _first_status(directory: RunDirectory, experiment: Experiment, start: resuming.Start | None) -> dict[str, Any]:
    """The status of a run that this process is about to launch."""
    notes = start.notes if start is not None else []
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
        "resumed_from": None if start is None else str(start.folder),
        "launcher": identity(os.getpid()),
        "supervisor": None,
        "ranks": [],
        "cause": None,
    }


def _working_directory() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        raise ExperimentError([Problem("", "the current directory has been deleted; change to another one")]) from None


def _prepare(experiment: Experiment, resume: Run | str | None) -> tuple[RunDirectory, resuming.Start | None]:
    """The run directory, with the checkpoint to go on from in it if there is one; ExperimentError, see `launch`."""
    if resume is None:
        return _create(experiment), None
    for _ in range(RESUME_TRIES):
        with contextlib.suppress(resuming.VanishedError):
            start = resuming.find_start(resume, experiment)
            return _create(experiment, start), start
    raise resuming.gone(resume)


def _create(experiment: Experiment, start: resuming.Start | None = None) -> RunDirectory:
    """The run directory with the experiment in it; ExperimentError if that cannot be written."""
    directory = None
    try:
        directory = RunDirectory.create(f"{experiment.workload.name}-{experiment.layout}")
        free = shutil.disk_usage(directory.path).free
        if free < LEAST_FREE_BYTES:
            directory.path.rmdir()
            raise ExperimentError([Problem("LABKIT_HOME", f"only {free / 2**20:.1f} MB are free in {home()}")])
        run_status.reserve(directory)
        # The experiment makes the run visible, so it comes last.
        run_status.update(directory, **_first_status(directory, experiment, start))
        if start is not None:
            start.take_along(directory)
        write_json(directory.experiment, experiment.to_dict())
        directory.come_last()
    except (OSError, resuming.VanishedError) as error:
        if directory is not None:
            safe_files.remove_folder(directory.path)
        if not isinstance(error, OSError):
            raise
        why = error.strerror or str(error)
        raise ExperimentError([Problem("LABKIT_HOME", f"cannot write a run to {home()}: {why}")]) from None
    return directory
