"""Many runs, one after another: every combination of some values, in a queue that can be stopped and resumed.

    sweep = labkit.sweep(
        labkit.recipe("vision-ddp"),
        {
            "sparsity": [{"method": "none"}, {"method": "rigl", "target": 0.9}],
            "quantization.training": ["fp32", "bf16"],
        },
        name="formats",
    )
    sweep.run()      # interrupt it whenever you like; the same cell resumes where it stopped

The queue and its progress are stored in `$LABKIT_HOME/sweeps/NAME.json`; results are stored in the run directories
only. Combinations that the rules refuse are kept with their reason. A run that was stopped before its end is run again
from its start, because its measurements would not be those of a complete run.

One process at a time runs the sweep of a name: it holds a lock on `NAME.lock`. If it is killed, its current run
continues; the next process that runs the sweep waits for that run instead of starting its point again. SIGTERM and
SIGHUP stop a sweep like an interrupt. If the home cannot be written, the sweep ends with one sentence, and the
remaining points stay waiting.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labkit.experiment import Experiment, ExperimentError, safe_files
from labkit.experiment.run_directory import home, read_json, write_json
from labkit.launch.client import launch
from labkit.runs.interrupts import as_interrupts
from labkit.runs.run import Run

MAX_POINTS = 10_000
MAX_FILE_BYTES = 256 * 2**20
STOP_WAIT_S = 60.0
"""How long to wait for a stopped run to end, so that its state can be saved (s)."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass
class Point:
    """One combination. `state`: waiting, running, refused, or the terminal state of its run."""

    label: str
    """The values that distinguish it from the other points, e.g. `rigl 0.9, bf16`."""
    experiment: Experiment
    state: str = "waiting"
    run_id: str | None = None
    reason: str = ""
    """Why it was refused or failed."""

    @property
    def done(self) -> bool:
        """Whether it will not be run again."""
        return self.state in ("finished", "failed", "refused")


class Sweep:
    """A queue of points (see the module docstring)."""

    def __init__(self, points: Sequence[Point], path: Path) -> None:
        self.points, self.path = list(points), path
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._ended = threading.Event()
        """Set when the thread ends; a join that a signal interrupts would take a running thread for ended."""
        self._current: Run | None = None
        self._lock = threading.Lock()
        self._lock_descriptor: int | None = None
        """Descriptor of the locked file while this process runs the sweep."""
        self._started = 0.0
        """When the sweep was first started (Unix time)."""
        self._interrupted = False
        """Whether the process that ran it last was killed."""
        self.problem = ""
        """Why it could not continue, in one sentence; empty unless the reason lay outside its runs."""
        self.listeners: list[Callable[[Sweep], None]] = []
        """Called in the thread of the sweep when a point has changed."""

    @classmethod
    def over(cls, base: Experiment, values: Mapping[str, Sequence[Any]], name: str) -> Sweep:
        """Return the sweep over every combination of `values`, by field.

        It resumes the sweep of this name if that has the same points. ValueError if another sweep has this name, or a
        field does not exist.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"a sweep's name is made of letters, digits, dots, dashes and underscores, not {name!r}")
        points = list(combinations(base, values))
        queue = cls(points, home() / "sweeps" / f"{name}.json")
        queue._restore()
        return queue

    # -- running ------------------------------------------------------------------------------------------------------

    def run(self, progress: Callable[[Sweep], None] | None = None) -> Sweep:
        """Run the remaining points and return; an interrupt stops the current run and keeps the rest for later.

        ValueError if another process runs the sweep of this name. Afterwards `problem` is not empty if it could not
        continue.
        """
        report = progress or _ProgressLine()
        with as_interrupts(replace=False):
            self.start()
            try:
                while self.running:
                    report(self)
                    self.wait(0.5)
            except KeyboardInterrupt:
                self.stop()
            report(self)
        return self

    def start(self) -> Sweep:
        """Run the remaining points in the background and return at once. ValueError as in `run`."""
        with self._lock:
            if not self.running:
                self._acquire_lock()
                self._stopping.clear()
                self._ended.clear()
                self.problem = ""
                self._thread = threading.Thread(target=self._work, name="labkit-sweep", daemon=True)
                self._thread.start()
        return self

    @property
    def running(self) -> bool:
        """Whether this process is running it."""
        return self._thread is not None and not self._ended.is_set()

    def stop(self) -> Sweep:
        """Stop the current run, start no other, and return when it has ended."""
        self._stopping.set()
        current = self._current
        if current is not None:
            with contextlib.suppress(TimeoutError):  # on a busy machine; `wait` below lets the thread save the outcome
                current.stop()
        return self.wait(STOP_WAIT_S)

    def wait(self, timeout: float | None = None) -> Sweep:
        """Wait until everything is done or stopped, or `timeout` seconds have passed."""
        if self._thread is not None:
            self._ended.wait(timeout)
        return self

    def _acquire_lock(self) -> None:
        """Acquire the lock of this name and load what other processes have saved. ValueError if it is locked."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = safe_files.open_to_lock(self.path.with_suffix(".lock"))
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            message = f"the sweep {self.path.stem} is being run by another process; wait for it, or choose another name"
            raise ValueError(message) from None
        try:
            self._restore()
            self._save(open_=True)
        except BaseException:
            os.close(descriptor)
            raise
        self._lock_descriptor = descriptor

    def _work(self) -> None:
        """Run the remaining points, in the thread of the sweep."""
        try:
            self._adopt_runs()
            for point in self.points:
                if self._stopping.is_set():
                    break
                if not point.done:
                    self._run_point(point)
            self._save(open_=False)
        except OSError as error:
            # The runs are on disk, where `_adopt_runs` finds them.
            self.problem = f"the sweep cannot be written to {self.path}: {error.strerror or error}"
        except _CannotContinueError as error:
            self.problem = str(error)
            with contextlib.suppress(OSError):
                self._save(open_=False)
        finally:
            descriptor, self._lock_descriptor = self._lock_descriptor, None
            if descriptor is not None:
                os.close(descriptor)
            self._ended.set()

    def _adopt_runs(self) -> None:
        """Assign runs to their points that a killed process started but did not save in the file."""
        if not self._interrupted:
            return
        points = {self._resolved(point): point for point in self.points if not point.done and point.run_id is None}
        points.pop("", None)
        for run in Run.all():
            if not points or float(run.status.get("created") or 0) < self._started:
                continue
            try:
                point = points.get(run.experiment.to_json())
            except ExperimentError:
                continue
            if point is not None and run.state in ("finished", "starting", "running"):
                del points[self._resolved(point)]
                point.run_id, point.state = run.id, "finished" if run.state == "finished" else "running"
        self._save(open_=True)

    @staticmethod
    def _resolved(point: Point) -> str:
        """Return the experiment of a point as its run stores it; an empty string if it is refused."""
        try:
            return point.experiment.check().to_json()
        except ExperimentError:
            return ""

    def _run_point(self, point: Point) -> None:
        """Launch the run of a point, or attach to one in progress; wait for it and save its state."""
        run = self._still_running(point)
        if run is None:
            problems = point.experiment.problems()
            if problems:
                point.state, point.reason = "refused", " ".join(map(str, problems))
                self._save()
                return
            try:
                run = launch(point.experiment, baseline=None)
            except ExperimentError as error:
                if any(problem.field == "LABKIT_HOME" for problem in error.problems):
                    raise _CannotContinueError(f"the sweep cannot continue: {error}") from None
                point.state, point.reason = "refused", str(error)
                self._save()
                return
            except Exception as error:
                point.state, point.reason = "failed", str(error)
                self._save()
                return
        self._current = run
        point.state, point.run_id = "running", run.id
        self._save()
        if self._stopping.is_set():  # the stop was requested before there was a run
            run.request_stop(0.0)
        run.wait()
        self._current = None
        point.state = run.state
        point.reason = str((run.cause or {}).get("message", "")) if run.state == "failed" else ""
        self._save()

    @staticmethod
    def _still_running(point: Point) -> Run | None:
        """Return the run of a point that an earlier process started and that is still in progress, if there is one."""
        if point.run_id is None or point.state != "running":
            return None
        try:
            run = Run.attach(point.run_id)
        except FileNotFoundError:
            return None
        return run if run.state in ("starting", "running") else None

    # -- the file -----------------------------------------------------------------------------------------------------

    def _save(self, open_: bool = True) -> None:
        """Save the state of all points and notify the listeners; `open_`: this process continues to run the sweep."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        points = [
            {
                "label": point.label,
                "experiment": point.experiment.to_dict(),
                "state": point.state,
                "run_id": point.run_id,
                "reason": point.reason,
            }
            for point in self.points
        ]
        self._started = self._started or time.time()
        write_json(self.path, {"format": 1, "begun": self._started, "open": open_, "points": points})
        for listener in self.listeners:
            listener(self)

    def _restore(self) -> None:
        """Load what an earlier process has saved. ValueError if the file is damaged or of another sweep."""
        stored = read_json(self.path, MAX_FILE_BYTES)
        if stored is None and not os.path.lexists(self.path):
            return
        entries = stored.get("points") if isinstance(stored, dict) else None
        if not isinstance(entries, list):
            message = f"the file of the sweep {self.path.stem} is damaged; remove {self.path}, or choose another name"
            raise ValueError(message)
        started = stored.get("begun")
        self._started = float(started) if isinstance(started, int | float) else 0.0
        self._interrupted = stored.get("open") is True
        expected = [point.experiment.to_dict() for point in self.points]
        if [entry.get("experiment") for entry in entries if isinstance(entry, dict)] != expected:
            raise ValueError(
                f"the sweep {self.path.stem} has other points; give this one another name or delete {self.path}"
            )
        for point, entry in zip(self.points, entries, strict=True):
            point.run_id = entry.get("run_id") if isinstance(entry.get("run_id"), str) else None
            point.state, point.reason = str(entry.get("state")), str(entry.get("reason") or "")
            if point.run_id is not None:
                try:
                    point.state = Run.attach(point.run_id).state
                except FileNotFoundError:
                    point.run_id, point.state = None, "waiting"
            if point.state in ("starting", "running"):
                point.state = "running"  # its run continues without the sweep
            elif not point.done:
                point.state = "waiting"

    # -- results ------------------------------------------------------------------------------------------------------

    @property
    def runs(self) -> list[Run]:
        """The finished runs, in the order of the points."""
        return [Run.attach(point.run_id) for point in self.points if point.run_id and point.state == "finished"]

    @property
    def counts(self) -> dict[str, int]:
        """Number of points in each state."""
        counts: dict[str, int] = {}
        for point in self.points:
            counts[point.state] = counts.get(point.state, 0) + 1
        return counts

    def table(self) -> list[dict[str, Any]]:
        """Return one row per point: label, state, run, metric, loss, seconds, peak memory, reason for a refusal."""
        rows = []
        for point in self.points:
            row: dict[str, Any] = {"point": point.label, "state": point.state, "run": point.run_id or ""}
            if point.run_id and point.state == "finished":
                summary = Run.attach(point.run_id).summary()
                key = (summary["metric"] or {}).get("key", "")
                peaks = [peak for peak in summary["peak_memory_bytes"] if peak]
                row |= {
                    key or "metric": summary["metrics"].get(key),
                    "loss": summary["metrics"].get("loss"),
                    "seconds": summary["seconds"],
                    "peak_memory_bytes": max(peaks) if peaks else None,
                }
            rows.append(row | {"reason": point.reason})
        return rows

    def __repr__(self) -> str:
        message = ", ".join(f"{count} {state}" for state, count in self.counts.items())
        return f"<Sweep {self.path.stem}: {message}>"


class _CannotContinueError(Exception):
    """Nothing can be launched on this machine any more; the remaining points are not the reason."""


def sweep(base: Experiment, over: Mapping[str, Sequence[Any]], name: str = "sweep") -> Sweep:
    """Return the queue of every combination of the values in `over`, by field, applied to `base`."""
    return Sweep.over(base, over, name)


def combinations(base: Experiment, values: Mapping[str, Sequence[Any]]) -> Iterator[Point]:
    """Yield the points of a grid; the last field varies fastest. ValueError if it is empty or too large."""
    if not values or not all(values.values()):
        raise ValueError("a sweep needs at least one field, and values for each")
    sizes = [len(choices) for choices in values.values()]
    total = 1
    for size in sizes:
        total *= size
    if total > MAX_POINTS:
        raise ValueError(f"{total:,} combinations are more than {MAX_POINTS:,}")
    for chosen in itertools.product(*values.values()):
        label = ", ".join(_label_part(field, value) for field, value in zip(values, chosen, strict=True))
        yield Point(label, base.set(dict(zip(values, chosen, strict=True))).set({"name": label}))


def _label_part(field: str, value: Any) -> str:
    """Return how a label names the value of a field."""
    if isinstance(value, dict):
        return " ".join(str(part) for part in value.values()) or field.rpartition(".")[2]
    return str(value) if isinstance(value, str) else f"{field.rpartition('.')[2]} {value}"


class _ProgressLine:
    """Prints the progress of a sweep on one line and overwrites it when it changes: a notebook keeps all of it."""

    def __init__(self) -> None:
        self._printed = ""

    def __call__(self, sweep: Sweep) -> None:
        done, total = sum(point.done for point in sweep.points), len(sweep.points)
        now = next((point.label for point in sweep.points if point.state == "running"), "")
        end = "\n" if not sweep.running else ""
        line = f"\r{done}/{total} {safe_files.printable(now):60.60}{end}"
        if line != self._printed:
            self._printed = line
            sys.stdout.write(line)
            sys.stdout.flush()
