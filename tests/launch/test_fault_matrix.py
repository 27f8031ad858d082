"""Who dies, when and how: every case ends in time, in the right state, with the right cause, and leaves nothing.

A covering sample always runs; `make exhaustive` runs the others.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from labkit.experiment import Experiment
from labkit.launch import launch, standby_pid
from tests.launch.helpers import start, steps_written, tiny, wait_until

TASK = Path(__file__).with_name("matrix_task.py")
MARK = "LABKIT_TEST_CASE"


@dataclass(frozen=True)
class Case:
    """One fault of one process, and what must come of it."""

    when: str
    how: str
    words: tuple[str, ...] = ()
    """What the message of the cause holds."""
    state: str = "failed"
    rank: int = 1
    ranks: int = 2
    at: int = 10
    steps: int = 25
    within: float = 40.0
    stop: bool = False
    """Ask it to stop once it trains."""
    always: bool = False
    """Part of the sample."""
    changes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        stopping = "-while-stopping" if self.stop else ""
        return f"{self.when}-{self.how}-{self.rank}-of-{self.ranks}{stopping}".replace(" ", "_")


LOADER = {"training.loader_workers": 1}
SAVES = {"training.checkpoint_every": 5}
JUDGES = {"training.evaluate_every": 5}
ENDLESS = 1_000_000

CASES = [
    # a rank, by signals
    *(Case("forward", name, (f"rank 1 was killed by {name}",)) for name in ("SIGKILL", "SIGTERM", "SIGHUP", "SIGABRT")),
    Case("forward", "SIGKILL", ("rank 2 was killed by SIGKILL",), rank=2, ranks=4),
    Case("forward", "segfault", ("rank 1 was killed by SIGSEGV",), always=True),
    Case("forward", "abort", ("rank 1 was killed by SIGABRT",)),
    Case("backward", "SIGKILL", ("rank 1 was killed by SIGKILL",)),
    Case("build", "SIGKILL", ("rank 0 was killed by SIGKILL",), rank=0),
    Case("forward", "SIGSTOP", ("rank 1 has been silent",)),
    *(Case("forward", name, state="finished") for name in ("SIGINT", "SIGUSR1", "SIGPIPE")),
    # a rank, by leaving
    Case("forward", "exit 75", ("rank 1 left with exit code 75 before it was done",), always=True),
    Case("forward", "_exit 75", ("rank 1 left with exit code 75 before it was done",)),
    Case("forward", "exit 75", ("rank 0 left with exit code 75 before it was done",), rank=0, ranks=1),
    Case("forward", "_exit 75", ("rank 0 left with exit code 75 before it was done",), rank=0, ranks=1, always=True),
    Case("forward", "_exit 0", ("rank 1 left with exit code 0 before it was done",)),
    Case("forward", "_exit 1", ("rank 1 left with exit code 1 before it was done",)),
    Case("end", "_exit 75", ("rank 1 left with exit code 75", "nobody asked")),
    Case("end", "_exit 0", state="finished"),
    Case("end", "_exit 75", state="stopped", stop=True, steps=ENDLESS),
    Case("end", "_exit 1", ("rank 1 left with exit code 1",), stop=True, steps=ENDLESS),
    Case("forward", "exit 0", ("rank 1 raised SystemExit: 0",)),
    Case("forward", "exit 3", ("rank 1 raised SystemExit: 3",)),
    Case("loss", "exit text", ("rank 1 raised SystemExit: I leave",)),
    # a rank, by exceptions
    Case("forward", "exception", ("rank 0 raised ValueError: bad data",), rank=0, ranks=4),
    Case("data", "exception", ("of train cannot be read: ValueError: bad data of this rank",), rank=0, ranks=1),
    Case("backward", "exception", ("rank 1 raised ValueError: bad data",)),
    Case("eval", "exception", ("rank 0 raised ValueError: bad data",), rank=0, at=6, steps=50, changes=JUDGES),
    Case("forward", "surrogate", ("rank 1 raised ValueError: bad file",), always=True),
    Case("forward", "control", ("rank 1 raised ValueError",)),
    Case("forward", "wordless", ("rank 1 raised Wordless",), always=True),
    Case("forward", "empty", ("rank 1 raised ValueError",)),
    Case("forward", "keyboard", ("rank 1 raised KeyboardInterrupt",)),
    Case("forward", "memory", ("rank 1 raised MemoryError",)),
    Case("data", "stop iteration", ("of train cannot be read: StopIteration",)),
    # a rank that hangs
    Case("build", "loop", ("rank 1 has been silent", "setup"), within=90, always=True),
    Case("eval", "loop", ("rank 1 has been silent", "evaluation"), at=6, steps=50, changes=JUDGES, always=True),
    Case("forward", "loop", ("rank 1 has been silent", "forward")),
    Case("forward", "loop with the lock", ("rank 1 has been silent",)),
    Case("forward", "ignore SIGTERM", ("rank 1 has been silent",)),
    Case("data", "loop", ("rank 1 has been silent", "data")),
    Case("forward", "flood", ("rank 1 has been silent",), always=True),
    Case("forward", "flood of lines", ("rank 1 has been silent",)),
    # a checkpoint
    Case("save", "SIGKILL", ("rank 0 was killed by SIGKILL",), rank=0, changes=SAVES, always=True),
    Case("save", "exception", ("rank 0 raised ValueError: bad data",), rank=0, changes=SAVES),
    Case("save", "SIGSTOP", ("rank 0 has been silent", "checkpoint"), rank=0, changes=SAVES),
    Case("save", "parent SIGKILL", ("supervisor was killed",), rank=0, changes=SAVES, always=True),
    # the supervisor
    Case("forward", "parent SIGKILL", ("supervisor was killed",)),
    Case("build", "parent SIGKILL", ("supervisor was killed",)),
    Case("forward", "parent SIGTERM", ("SIGTERM",), state="stopped", steps=ENDLESS),
    Case("forward", "parent SIGINT", state="finished"),
    Case("forward", "parent SIGSTOP", ("supervisor did not answer",), always=True),
    # what a rank has started
    Case("forward", "child", state="finished"),
    Case("forward", "daemon", state="finished", always=True),
    Case("forward", "fork", state="finished"),
    Case("forward", "child, exception", ("left a child",)),
    Case("forward", "stdio", state="finished"),
    # loader processes
    Case("loader", "exception", ("of train", "ValueError: bad data of this rank"), at=4, changes=LOADER, always=True),
    Case("loader", "loop", ("rank 1 has been silent", "data"), at=4, changes=LOADER, always=True),
    Case("loader", "SIGSTOP", ("rank 1 has been silent", "data"), at=4, changes=LOADER),
    Case("loader", "ignore SIGTERM", ("rank 1 has been silent", "data"), at=4, changes=LOADER),
    Case("loader", "SIGKILL", ("rank 1", "worker"), at=4, changes=LOADER),
    Case("loader", "segfault", ("rank 1", "worker"), at=4, changes=LOADER),
]


def _cases() -> list[Any]:
    return [pytest.param(case, id=str(case), marks=() if case.always else pytest.mark.exhaustive) for case in CASES]


def experiment_of(case: Case) -> Experiment:
    quick = {"launch.timeout_s": 3, "launch.grace_s": 3} | case.changes
    return tiny(ranks=case.ranks, steps=case.steps, workload={"name": "custom", "path": f"{TASK}:make_task"}).set(quick)


def alive_with(mark: str) -> list[str]:
    """Processes of the run: its supervisor, ranks, and whatever these have started (the standby is none of them)."""
    left = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get("LABKIT_TEST_SESSION") == os.environ["LABKIT_TEST_SESSION"]
            if ours and process.pid not in (os.getpid(), standby_pid()) and process.status() != psutil.STATUS_ZOMBIE:
                left.append(f"{process.pid}: {' '.join(process.cmdline())[:80]}")
        except psutil.Error:
            continue
    return [text for text in left if "resource_tracker" not in text]


def orphaned_segments() -> set[str]:
    """Return the names of torch's segments of shared memory (`torch_PID_...`) whose process is gone."""
    segments = {name for name in os.listdir("/dev/shm") if name.startswith("torch_")}
    return {name for name in segments if not psutil.pid_exists(int(name.split("_")[1]))}


@pytest.mark.parametrize("case", _cases())
def test_every_fault_ends_well(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = {"rank": case.rank, "when": case.when, "how": case.how, "at": case.at}
    monkeypatch.setenv("LABKIT_FAULT", json.dumps(fault))
    before = orphaned_segments()
    run = start(experiment_of(case))
    if case.stop:
        wait_until(lambda: steps_written(run, 0) > 3, 30, "steps")
        run.request_stop()
    run.wait(case.within)
    left = alive_with(run.id)
    cause = run.cause
    assert run.state == case.state, cause
    message = cause["message"] if cause else ""
    for word in case.words:
        assert word in message
    innocent = [f"rank {rank} " for rank in range(case.ranks) if rank != case.rank]
    assert not any(name in message for name in innocent), message
    # The supervisor itself goes right after it has written the end; nothing else may be there any more.
    allowed = 1 if "supervisor" not in message else 0
    assert len(left) <= allowed + (case.how.startswith("parent SIGKILL")) * case.ranks, left
    wait_until(lambda: not alive_with(run.id), 5, "all processes gone")
    hidden = [path.name for path in run.directory.path.rglob(".*") if path.name not in (".lock", ".reserve")]
    assert not hidden
    assert not orphaned_segments() - before
    assert all(path.stat().st_size < 9 * 2**20 for path in run.directory.path.glob("*.log"))
    written = run.directory.status.read_bytes()
    time.sleep(0.2)
    assert run.state == case.state
    assert run.directory.status.read_bytes() == written


@pytest.mark.parametrize("stopped", [True, False])
def test_a_rank_that_floods_its_log_neither_blinds_nor_fills_the_supervisor(
    stopped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """issue 11, F14: it struck after 20 s instead of 4, held 2,175 MiB, and was killed by a stop."""
    fault = {"rank": 1, "when": "forward", "how": "flood", "at": 10}
    monkeypatch.setenv("LABKIT_FAULT", json.dumps(fault))
    case = Case("forward", "flood", changes={"launch.timeout_s": 60 if stopped else 4})
    run = start(experiment_of(case))
    log = run.directory.log(1)
    wait_until(lambda: log.exists() and log.stat().st_size > 2**22, 30, "the flood")
    begun = time.monotonic()
    supervisor = psutil.Process(run.status["supervisor"]["pid"])
    sizes = [supervisor.memory_info().rss]

    def ended() -> bool:
        with contextlib.suppress(psutil.Error):
            sizes.append(supervisor.memory_info().rss)
        return run.done or (stopped and time.monotonic() - begun > 3)

    wait_until(ended, 15, "the end of a rank that is silent")
    if stopped:
        begun = time.monotonic()
        run.stop(1)
        assert time.monotonic() - begun < 8
    assert run.state == ("stopped" if stopped else "failed"), run.cause
    assert "supervisor" not in run.cause["message"]
    assert max(sizes) - sizes[0] < 100 * 2**20


def test_the_next_run_is_good_after_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LABKIT_FAULT", raising=False)
    assert launch(tiny(steps=5), baseline=None).wait(60).state == "finished"
