"""Many runs, one after the other: every combination of some values, in a queue that can be stopped and gone on with.

    sweep = labkit.sweep(
        labkit.recipe("vision-ddp"),
        {
            "sparsity": [{"method": "none"}, {"method": "rigl", "target": 0.9}],
            "quantization.training": ["fp32", "bf16"],
        },
        name="formats",
    )
    sweep.run()      # interrupt it whenever you like; the same cell goes on where it stopped

What is to be run and what has been run stands in `$LABKIT_HOME/sweeps/NAME.json`; results stand in the run directories
and nowhere else. Combinations that the rules refuse are kept with their reason. A run that was stopped in the middle is
run again from its start: its figures would not be those of a whole run.

One process at a time runs the sweep of a name: it holds a lock on `NAME.lock`. If it is killed, its run goes on; who
runs the sweep next waits for that run instead of starting its point again. SIGTERM and SIGHUP stop a sweep as an
interrupt does. A home that cannot be written ends it in one sentence, and what is left stays waiting.
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
"""How long the end of a stopped run is waited for, so that it can be written down."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass
class Point:
    """One combination. `state`: waiting, running, refused, or the terminal state of its run."""

    label: str
    """What tells it from the others, e.g. `rigl 0.9, bf16`."""
    experiment: Experiment
    state: str = "waiting"
    run_id: str | None = None
    reason: str = ""
    """Why it was refused or failed."""

    @property
    def done(self) -> bool:
        """Will it not be run again?"""
        return self.state in ("finished", "failed", "refused")


class Sweep:
    """A queue of points; see the module."""

    def __init__(self, points: Sequence[Point], path: Path) -> None:
        self.points, self.path = list(points), path
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._ended = threading.Event()
        """Set when the thread is at its end; a join that a signal interrupts takes a thread for ended that is not."""
        self._current: Run | None = None
        self._lock = threading.Lock()
        self._held: int | None = None
        """Descriptor of the locked file while this process runs the sweep."""
        self._begun = 0.0
        """When the sweep was first started (Unix time)."""
        self._broken_off = False
        """Did the process that ran it last end without a word?"""
        self.problem = ""
        """Why it ended before all was done, in one sentence; empty if it was not for something outside of its runs."""
        self.listeners: list[Callable[[Sweep], None]] = []
        """Called when a point has changed, in the thread that works."""

    @classmethod
    def over(cls, base: Experiment, values: Mapping[str, Sequence[Any]], name: str) -> Sweep:
        """Every combination of `values`, by field; goes on with the sweep of this name if it has the same points.

        ValueError if the name is taken by another sweep, or a field does not exist.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"a sweep's name is made of letters, digits, dots, dashes and underscores, not {name!r}")
        points = list(combinations(base, values))
        queue = cls(points, home() / "sweeps" / f"{name}.json")
        queue._go_on()
        return queue

    # -- running ------------------------------------------------------------------------------------------------------

    def run(self, progress: Callable[[Sweep], None] | None = None) -> Sweep:
        """Run what is left; an interrupt stops the run that goes on and keeps the rest for later.

        ValueError if another process runs the sweep of this name. `problem` says afterwards whether it could not go on.
        """
        tell = progress or _print
        with as_interrupts(replace=False):
            self.start()
            try:
                while self.running:
                    tell(self)
                    self.wait(0.5)
            except KeyboardInterrupt:
                self.stop()
            tell(self)
        return self

    def start(self) -> Sweep:
        """The same in the background; returns at once."""
        with self._lock:
            if not self.running:
                self._hold()
                self._stopping.clear()
                self._ended.clear()
                self.problem = ""
                self._thread = threading.Thread(target=self._work, name="labkit-sweep", daemon=True)
                self._thread.start()
        return self

    @property
    def running(self) -> bool:
        """Is it going on?"""
        return self._thread is not None and not self._ended.is_set()

    def stop(self) -> Sweep:
        """Stop the run that goes on and start no other; returns when it has ended."""
        self._stopping.set()
        current = self._current
        if current is not None:
            with contextlib.suppress(TimeoutError):  # a busy machine: what it came to is still waited for and kept
                current.stop()
        return self.wait(STOP_WAIT_S)

    def wait(self, timeout: float | None = None) -> Sweep:
        """Until all is done or stopped, or `timeout` seconds have passed."""
        if self._thread is not None:
            self._ended.wait(timeout)
        return self

    def _hold(self) -> None:
        """Take the lock of this name, and over what another process has found since; ValueError if it is taken."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        held = safe_files.open_to_lock(self.path.with_suffix(".lock"))
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(held)
            said = f"the sweep {self.path.stem} is being run by another process; wait for it, or choose another name"
            raise ValueError(said) from None
        try:
            self._go_on()
            self._keep(open_=True)
        except BaseException:
            os.close(held)
            raise
        self._held = held

    def _work(self) -> None:
        try:
            self._adopt()
            for point in self.points:
                if self._stopping.is_set():
                    break
                if not point.done:
                    self._measure(point)
            self._keep(open_=False)
        except OSError as error:
            # What has been run is on disk, and found again by `_adopt`.
            self.problem = f"the sweep cannot be written to {self.path}: {error.strerror or error}"
        except _CannotGoOnError as error:
            self.problem = str(error)
            with contextlib.suppress(OSError):
                self._keep(open_=False)
        finally:
            held, self._held = self._held, None
            if held is not None:
                os.close(held)
            self._ended.set()

    def _adopt(self) -> None:
        """After a process that ended without a word: its runs that the file does not name belong to their points."""
        if not self._broken_off:
            return
        points = {self._resolved(point): point for point in self.points if not point.done and point.run_id is None}
        points.pop("", None)
        for run in Run.all():
            if not points or float(run.status.get("created") or 0) < self._begun:
                continue
            try:
                point = points.get(run.experiment.to_json())
            except ExperimentError:
                continue
            if point is not None and run.state in ("finished", "starting", "running"):
                del points[self._resolved(point)]
                point.run_id, point.state = run.id, "finished" if run.state == "finished" else "running"
        self._keep(open_=True)

    @staticmethod
    def _resolved(point: Point) -> str:
        """The experiment of a point as its run writes it down; empty if it may not run."""
        try:
            return point.experiment.check().to_json()
        except ExperimentError:
            return ""

    def _measure(self, point: Point) -> None:
        run = self._attached(point)
        if run is None:
            problems = point.experiment.problems()
            if problems:
                point.state, point.reason = "refused", " ".join(map(str, problems))
                self._keep()
                return
            try:
                run = launch(point.experiment, baseline=None)
            except ExperimentError as error:
                if any(problem.field == "LABKIT_HOME" for problem in error.problems):
                    raise _CannotGoOnError(f"the sweep cannot go on: {error}") from None
                point.state, point.reason = "refused", str(error)
                self._keep()
                return
            except Exception as error:
                point.state, point.reason = "failed", str(error)
                self._keep()
                return
        self._current = run
        point.state, point.run_id = "running", run.id
        self._keep()
        if self._stopping.is_set():  # it was asked to before there was a run to stop
            run.request_stop(0.0)
        run.wait()
        self._current = None
        point.state = run.state
        point.reason = str((run.cause or {}).get("message", "")) if run.state == "failed" else ""
        self._keep()

    @staticmethod
    def _attached(point: Point) -> Run | None:
        """The run of a point that an earlier process has started and that still goes on."""
        if point.run_id is None or point.state != "running":
            return None
        try:
            run = Run.attach(point.run_id)
        except FileNotFoundError:
            return None
        return run if run.state in ("starting", "running") else None

    # -- what is kept -------------------------------------------------------------------------------------------------

    def _keep(self, open_: bool = True) -> None:
        """Write down where it stands; `open_`: this process goes on with it."""
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
        self._begun = self._begun or time.time()
        write_json(self.path, {"format": 1, "begun": self._begun, "open": open_, "points": points})
        for listener in self.listeners:
            listener(self)

    def _go_on(self) -> None:
        """Take over what an earlier process has found; ValueError if the file is damaged or another sweep's."""
        stored = read_json(self.path, MAX_FILE_BYTES)
        if stored is None and not os.path.lexists(self.path):
            return
        known = stored.get("points") if isinstance(stored, dict) else None
        if not isinstance(known, list):
            said = f"the file of the sweep {self.path.stem} is damaged; remove {self.path}, or choose another name"
            raise ValueError(said)
        begun = stored.get("begun")
        self._begun = float(begun) if isinstance(begun, int | float) else 0.0
        self._broken_off = stored.get("open") is True
        wanted = [point.experiment.to_dict() for point in self.points]
        if [one.get("experiment") for one in known if isinstance(one, dict)] != wanted:
            raise ValueError(
                f"the sweep {self.path.stem} has other points; give this one another name or delete {self.path}"
            )
        for point, one in zip(self.points, known, strict=True):
            point.run_id = one.get("run_id") if isinstance(one.get("run_id"), str) else None
            point.state, point.reason = str(one.get("state")), str(one.get("reason") or "")
            if point.run_id is not None:
                try:
                    point.state = Run.attach(point.run_id).state
                except FileNotFoundError:
                    point.run_id, point.state = None, "waiting"
            if point.state in ("starting", "running"):
                point.state = "running"  # it goes on without its sweep
            elif not point.done:
                point.state = "waiting"

    # -- results ------------------------------------------------------------------------------------------------------

    @property
    def runs(self) -> list[Run]:
        """Those that have finished, in the order of the points."""
        return [Run.attach(point.run_id) for point in self.points if point.run_id and point.state == "finished"]

    @property
    def counts(self) -> dict[str, int]:
        """How many points are in each state."""
        found: dict[str, int] = {}
        for point in self.points:
            found[point.state] = found.get(point.state, 0) + 1
        return found

    def table(self) -> list[dict[str, Any]]:
        """One row a point: label, state, run, metric, loss, seconds, peak memory, what was refused and why."""
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
        said = ", ".join(f"{count} {state}" for state, count in self.counts.items())
        return f"<Sweep {self.path.stem}: {said}>"


class _CannotGoOnError(Exception):
    """Nothing can be launched here any more; the points that are left are not at fault."""


def sweep(base: Experiment, over: Mapping[str, Sequence[Any]], name: str = "sweep") -> Sweep:
    """The queue of every combination of the values in `over`, by field, beginning from `base`; see the module."""
    return Sweep.over(base, over, name)


def combinations(base: Experiment, values: Mapping[str, Sequence[Any]]) -> Iterator[Point]:
    """The points of a grid, the last field fastest."""
    if not values or not all(values.values()):
        raise ValueError("a sweep needs at least one field, and values for each")
    sizes = [len(choices) for choices in values.values()]
    total = 1
    for size in sizes:
        total *= size
    if total > MAX_POINTS:
        raise ValueError(f"{total:,} combinations are more than {MAX_POINTS:,}")
    for chosen in itertools.product(*values.values()):
        label = ", ".join(_word(field, value) for field, value in zip(values, chosen, strict=True))
        yield Point(label, base.set(dict(zip(values, chosen, strict=True))).set({"name": label}))


def _word(field: str, value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(str(part) for part in value.values()) or field.rpartition(".")[2]
    return str(value) if isinstance(value, str) else f"{field.rpartition('.')[2]} {value}"


def _print(sweep: Sweep) -> None:
    """One line that is written over."""
    done, of = sum(point.done for point in sweep.points), len(sweep.points)
    now = next((point.label for point in sweep.points if point.state == "running"), "")
    end = "\n" if not sweep.running else ""
    sys.stdout.write(f"\r{done}/{of} {safe_files.printable(now):60.60}{end}")
    sys.stdout.flush()
