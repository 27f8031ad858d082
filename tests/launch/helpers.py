"""Tiny real runs, and a watcher that proves how each of them ends."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from labkit.experiment import Experiment
from labkit.experiment.run_directory import TERMINAL, RunDirectory
from labkit.launch import client, launch, warm
from labkit.runs import Run
from labkit.runs.processes import alive

ENDLESS = 1_000_000
SMALLEST = {"name": "vision", "image_size": 8, "width": 4, "depth": 1, "shift": 0}
FAULTY = Path(__file__).parent / "faulty.py"
GONE_S = 3.0
"""How long after the terminal state a process of the run may still be there."""
_CREATED = 30.0


def tiny(ranks: int = 2, steps: int = 20, **changes: Any) -> Experiment:
    """Data parallelism on the smallest vision model; `changes` with `__` for the dot: `launch__timeout_s=3`."""
    fields = {
        "workload": SMALLEST,
        "layout.dp_replicate": ranks,
        "training.steps": steps,
        "training.global_batch": 12,
        "training.evaluate_every": 0,
        "training.checkpoint_every": 0,
        "launch.device": "cpu",
        "launch.max_duration_s": 120,
    }
    return Experiment().set(fields | {name.replace("__", "."): value for name, value in changes.items()})


def faulty(function: str, **changes: Any) -> Experiment:
    """A run of one of the faulty tasks in faulty.py."""
    return tiny(workload={"name": "custom", "path": f"{FAULTY}:{function}"}, **changes)


# The supervisor runs this code before it forks its ranks: what the launching side's environment says.
_SITE = """
import gc, os
freeze = gc.freeze
def patched():  # called by the standby once the engine has been loaded
    from labkit.launch.supervisor import Supervisor
    start = Supervisor.start
    def change(self):
        if self.experiment.layout.world_size > 1:
            exec(os.environ.get("LABKIT_TEST_CHANGE", "pass"), {})
        start(self)
    Supervisor.start = change
    freeze()
gc.freeze = patched
"""


@contextlib.contextmanager
def changed_ranks(folder: Path) -> Iterator[None]:
    """While it is open, runs of several ranks execute the code in LABKIT_TEST_CHANGE first. `folder` is empty."""
    (folder / "sitecustomize.py").write_text(_SITE)
    client.close()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(folder))
        client.warm(60)
        yield
    client.close()


def start(experiment: Experiment, **options: Any) -> Run:
    """Launch from a standby that is ready: bounds in seconds are about the run, not about importing torch."""
    warm(60)
    return launch(experiment, baseline=None, **options)


def wait_until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true value of `condition`; AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)


def whole_lines(directory: RunDirectory, rank: int) -> list[bytes]:
    """The complete lines of a rank's event file."""
    path = directory.events(rank)
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def events(run: Run, rank: int) -> list[dict[str, Any]]:
    """All events of a rank; every complete line must parse."""
    return [json.loads(line) for line in whole_lines(run.directory, rank)]


def steps_written(run: Run, rank: int) -> int:
    """How many updates a rank has reported."""
    return sum(len(event["loss"]) for event in events(run, rank) if event["event"] == "steps")


def processes(run: Run) -> dict[str, dict[str, Any]]:
    """Supervisor and ranks by name, as pid and start time."""
    status = run.status
    found = {f"rank {entry['rank']}": entry for entry in status.get("ranks") or []}
    return found | ({"supervisor": status["supervisor"]} if status.get("supervisor") else {})


def descendants(known: dict[str, Any]) -> list[dict[str, Any]]:
    """Everything that a process has started, and what that has started."""
    import psutil

    from labkit.runs.processes import identity

    return [identity(child.pid) for child in psutil.Process(known["pid"]).children(recursive=True)]


def socket_inodes(pid: int) -> set[str]:
    """Inodes of the sockets that a process holds."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target.startswith("socket:["):
            found.add(target[8:-1])
    return found


def tcp(pid: int) -> list[tuple[str, bool]]:
    """(local address in hex, is it listening?) of every TCP socket of a process."""
    mine, found = socket_inodes(pid), []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[9] in mine:
                found.append((columns[1].rpartition(":")[0], columns[3] == "0A"))
    return found


class Watched:
    """Records every state that a run shows, and on leaving proves that it ended once, wholly and without loss."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.states: list[str] = []
        self.after_terminal: set[bytes] = set()
        self.processes: list[dict[str, Any]] = []
        self.lines: dict[int, list[bytes]] = {}
        self.world_size = run.experiment.layout.world_size
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def _poll(self) -> None:
        # Reads the file itself: `run.status` would write the end of a run whose supervisor is gone.
        while not self._ended.wait(0.004):
            text = self.run.directory.status.read_bytes()
            state = json.loads(text)["state"]  # replaced by rename, so it is never torn
            if not self.states or self.states[-1] != state:
                self.states.append(state)
            if state in TERMINAL:
                self.after_terminal.add(text)

    def __enter__(self) -> Watched:
        self._thread.start()
        return self

    def begun(self, steps: int = 3) -> dict[str, dict[str, Any]]:
        """Wait until every rank has reported some steps; returns the run's processes."""

        def all_reported() -> bool:
            assert not self.run.done, self.run.cause
            return all(steps_written(self.run, rank) >= steps for rank in range(self.world_size))

        wait_until(all_reported, _CREATED, "the first steps")
        named = processes(self.run)
        assert len(named) == self.world_size + 1
        self.processes += [*named.values(), *descendants(named["supervisor"])]
        self.lines = {rank: whole_lines(self.run.directory, rank) for rank in range(self.world_size)}
        return named

    def ends(self, state: str, within: float, kind: str | None = None) -> dict[str, Any]:
        """Wait for the end, at most `within` seconds; returns the cause."""
        begun = time.monotonic()
        self.run.wait(within)
        assert time.monotonic() - begun <= within
        assert self.run.state == state, self.run.cause
        cause = self.run.cause
        if state == "finished":
            assert cause is None
            return {}
        assert cause is not None
        assert cause["message"].strip()
        assert "\n" not in cause["message"]
        assert kind is None or cause["kind"] == kind, cause
        return cause

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._prove()
        finally:
            self._ended.set()
            self._thread.join()
            if not self.run.done:
                self.run.stop(0)

    def _prove(self) -> None:
        assert self.run.done
        processes_now = [*processes(self.run).values(), *self.processes]
        wait_until(lambda: not any(map(alive, processes_now)), GONE_S, "all processes gone")
        time.sleep(0.2)  # long enough for somebody to write a second end
        assert self.states[-1] in TERMINAL
        assert not set(self.states[:-1]) & set(TERMINAL), f"the state changed after its end: {self.states}"
        assert len(self.after_terminal) == 1, "the status changed after its end"
        for rank, before in self.lines.items():
            assert whole_lines(self.run.directory, rank)[: len(before)] == before, f"rank {rank} lost events"
            events(self.run, rank)
