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
from pathlib import Path
from typing import IO, Any

from labkit.experiment import Experiment, ExperimentError, Problem
from labkit.experiment.run_directory import RunDirectory, home, read_json, standby_log, write_json
from labkit.runs import logs
from labkit.runs import status as run_status
from labkit.runs.processes import boot_id, frozen, identity, machine
from labkit.runs.run import Run

LEAST_FREE_BYTES = 2 * 2**20
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
            [sys.executable, "-m", "labkit.launch.standby"],
            stdin=subprocess.PIPE,
            stdout=self._says,
            stderr=log,
            start_new_session=True,  # the interrupt of a notebook goes to the kernel's whole process group
            env=os.environ | SINGLE_THREADED,
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


def _open_log() -> IO[bytes]:
    """Where standbys complain, e.g. that torch cannot be imported; a run that dies so shows the end of it."""
    path = standby_log(home())
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        logs.cap(path)
        return path.open("ab")
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
) -> Run:
    """Start a run in the background and return its handle at once.

    `resume` continues from the last checkpoint of another run. `baseline` names the one-process run that the speed-up
    refers to; "auto" takes the latest on this machine that fits. Raises ExperimentError, and launches nothing, if the
    experiment cannot run here or the run directory cannot be written.
    """
    requested = time.monotonic()
    resolved = experiment.check()
    checkpoint = None if resume is None else _last_checkpoint(resume)
    if checkpoint is not None:
        _refuse_other_training(checkpoint, resolved)
    here = _working_directory()
    directory = _create(resolved, checkpoint)
    order = {
        "run": str(directory.path),
        "requested": requested,
        "cwd": here,
        "environment": {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)},
        "baseline": baseline.id if isinstance(baseline, Run) else baseline,
        "resume": checkpoint,
    }
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


def _first_status(directory: RunDirectory, experiment: Experiment, checkpoint: str | None) -> dict[str, Any]:
    """The status of a run that this process is about to launch."""
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
        "warnings": [str(warning) for warning in experiment.warnings()],
        "resumed_from": checkpoint,
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


def _create(experiment: Experiment, checkpoint: str | None) -> RunDirectory:
    """The run directory with status and experiment in it; ExperimentError if that cannot be written."""
    try:
        directory = RunDirectory.create(f"{experiment.workload.name}-{experiment.layout}")
        free = shutil.disk_usage(directory.path).free
        if free < LEAST_FREE_BYTES:
            directory.path.rmdir()
            raise ExperimentError([Problem("LABKIT_HOME", f"only {free / 2**20:.1f} MB are free in {home()}")])
        run_status.reserve(directory)
        # The experiment makes the run visible, so it comes last.
        run_status.update(directory, **_first_status(directory, experiment, checkpoint))
        write_json(directory.experiment, experiment.to_dict())
    except OSError as error:
        why = error.strerror or str(error)
        raise ExperimentError([Problem("LABKIT_HOME", f"cannot write a run to {home()}: {why}")]) from None
    return directory


def _refuse_other_training(checkpoint: str, experiment: Experiment) -> None:
    """A resumed run continues the same training: another layout or length is fine, other samples or weights are not."""
    content = read_json(Path(checkpoint) / "checkpoint.json")
    try:
        before, step = Experiment.from_dict(content["experiment"]), int(content["step"])
    except (ExperimentError, KeyError, TypeError, ValueError):
        return  # damaged: the rank that reads it says how
    changed = [
        Problem(field, f"was {before.get(field)} in the run to resume and must stay so", before.get(field))
        for field in ("workload.name", "training.seed", "training.global_batch", "optimizer.name")
        if before.get(field) != experiment.get(field)
    ]
    if not changed and before.workload != experiment.workload:
        changed = [Problem("workload", "its options were others in the run to resume and must stay so")]
    steps = experiment.training.steps
    if steps is not None and steps <= step:
        changed.append(Problem("training.steps", f"{step} steps are done already, so there is nothing left", step + 1))
    if changed:
        raise ExperimentError(changed)


def _last_checkpoint(run: Run | str) -> str:
    try:
        run = Run.attach(run) if isinstance(run, str) else run
    except FileNotFoundError as error:
        raise ExperimentError([Problem("resume", str(error))]) from None
    steps = run.checkpoints()
    if not steps:
        raise ExperimentError([Problem("resume", f"run {run.id} has no checkpoint (set training.checkpoint_every)")])
    return str(run.directory.checkpoint(steps[-1]))
