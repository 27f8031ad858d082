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
"""

from __future__ import annotations

import itertools
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labkit.experiment import Experiment
from labkit.experiment.run_directory import home, read_json, write_json
from labkit.launch.client import launch
from labkit.runs.run import Run

MAX_POINTS = 10_000
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
        self._current: Run | None = None
        self._lock = threading.Lock()
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
        found = cls(points, home() / "sweeps" / f"{name}.json")
        found._go_on()
        return found

    # -- running ------------------------------------------------------------------------------------------------------

    def run(self, progress: Callable[[Sweep], None] | None = None) -> Sweep:
        """Run what is left; an interrupt stops the run that goes on and keeps the rest for later."""
        tell = progress or _print
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
                self._stopping.clear()
                self._thread = threading.Thread(target=self._work, name="labkit-sweep", daemon=True)
                self._thread.start()
        return self

    @property
    def running(self) -> bool:
        """Is it going on?"""
        return self._thread is not None and self._thread.is_alive()

    def stop(self) -> Sweep:
        """Stop the run that goes on and start no other; returns when it has ended."""
        self._stopping.set()
        current = self._current
        if current is not None:
            current.stop()
        return self.wait()

    def wait(self, timeout: float | None = None) -> Sweep:
        """Until all is done or stopped, or `timeout` seconds have passed."""
        if self._thread is not None:
            self._thread.join(timeout)
        return self

    def _work(self) -> None:
        for point in self.points:
            if self._stopping.is_set():
                return
            if not point.done:
                self._measure(point)

    def _measure(self, point: Point) -> None:
        problems = point.experiment.problems()
        if problems:
            point.state, point.reason = "refused", " ".join(map(str, problems))
            self._keep()
            return
        try:
            run = self._current = launch(point.experiment, baseline=None)
        except Exception as error:
            point.state, point.reason = "failed", str(error)
            self._keep()
            return
        point.state, point.run_id = "running", run.id
        self._keep()
        if self._stopping.is_set():  # it was asked to before there was a run to stop
            run.request_stop(0.0)
        run.wait()
        self._current = None
        point.state = run.state
        point.reason = str((run.cause or {}).get("message", "")) if run.state == "failed" else ""
        self._keep()

    # -- what is kept -------------------------------------------------------------------------------------------------

    def _keep(self) -> None:
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
        write_json(self.path, {"format": 1, "points": points})
        for listener in self.listeners:
            listener(self)

    def _go_on(self) -> None:
        """Take over what an earlier process has found."""
        stored = read_json(self.path)
        if stored is None and not self.path.exists():
            return
        known = stored.get("points") if isinstance(stored, dict) else None
        wanted = [point.experiment.to_dict() for point in self.points]
        if not isinstance(known, list) or [one.get("experiment") for one in known if isinstance(one, dict)] != wanted:
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
            if not point.done:
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
    sys.stdout.write(f"\r{done}/{of} {now:60.60}{end}")
    sys.stdout.flush()
