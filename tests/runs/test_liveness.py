"""The lock of a run: whoever holds it is alive, and nothing else is ever ended or taken for alive."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from labkit.experiment.run_directory import RunDirectory, read_json
from labkit.runs import Run, liveness, status
from labkit.runs.liveness import Life, check_lock
from labkit.runs.processes import boot_id, identity
from tests.runs.record import record

HOLD = """
import os, signal, sys, time
from pathlib import Path
from labkit.runs import liveness
lock = liveness.hold(Path(sys.argv[1]))
if os.fork() == 0:  # as a rank: it inherits no lock
    signal.pause() if sys.argv[2] == "child" else os._exit(0)
print("held", flush=True)
while sys.argv[2] != "still":
    lock.beat()
    time.sleep(0.05)
signal.pause()
"""


class Holder:
    """Another process that holds the lock of a run."""

    def __init__(self, directory: RunDirectory, how: str = "beats") -> None:
        arguments = [sys.executable, "-c", HOLD, str(directory.alive), how]
        self.process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "held\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    @property
    def lives(self) -> bool:
        return self.process.poll() is None


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[RunDirectory, Holder]]:
    """A run that goes on as far as its files and its lock tell; its holder has a child."""
    directory = record(tmp_path, "one", state="running", boot=boot_id())
    holder = Holder(directory, "child")
    status.update(directory, supervisor=identity(holder.process.pid))
    yield directory, holder
    try:
        os.killpg(holder.process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    holder.process.wait(10)


def test_a_held_lock_is_life_whatever_else_is_written(running: tuple[RunDirectory, Holder]) -> None:
    directory, holder = running
    assert check_lock(directory.alive) is Life.ALIVE
    assert liveness.holder(directory.alive) == holder.process.pid
    for lie in ({"supervisor": {"pid": 2**22 - 1, "start_time": 1.0}}, {"boot": "another boot"}, {"supervisor": None}):
        status.update(directory, **lie)
        assert Run(directory).state == "running"


def test_the_lock_is_free_when_its_holder_dies_though_its_child_lives(running: tuple[RunDirectory, Holder]) -> None:
    directory, holder = running
    holder.kill()
    assert check_lock(directory.alive) is Life.DEAD
    assert Run(directory).state == "failed"
    assert read_json(directory.status)["state"] == "failed", "the owner writes it"
    assert not directory.alive.exists()


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare(1) for another pid namespace")
def test_a_reader_in_another_container_changes_nothing(running: tuple[RunDirectory, Holder]) -> None:
    directory, holder = running
    enter = ["unshare", "--pid", "--fork", "--mount-proc", *([] if os.geteuid() == 0 else ["--user", "-r"])]
    if subprocess.run([*enter, "true"], capture_output=True).returncode != 0:
        pytest.skip("this machine allows no pid namespace")
    before = directory.status.read_bytes()
    code = (
        "import sys; from labkit.runs import Run, liveness; run = Run.attach(sys.argv[1]); "
        "print(run.state, liveness.end_holder(run.directory.alive))"
    )
    arguments = [*enter, sys.executable, "-c", code, str(directory.path)]
    said = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    assert said == "running False\n"
    assert directory.status.read_bytes() == before
    assert holder.lives


def copied(directory: RunDirectory, how: str) -> RunDirectory:
    """A copy of a run directory: its files anew, or as further names of the same files."""
    target = directory.path.with_name("copy")
    copy = os.link if how == "links" else shutil.copy2
    shutil.copytree(directory.path, target, copy_function=copy)
    return RunDirectory(target)


@pytest.mark.parametrize("how", ["files", "links"])
def test_stopping_a_copy_ends_nothing(
    running: tuple[RunDirectory, Holder], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, holder = running
    monkeypatch.setattr("labkit.runs.run.OVERTIME_S", 0.2)
    other = copied(directory, how)
    assert not liveness.end_holder(other.alive)
    try:
        Run(other).stop(0)
    except TimeoutError:
        pass
    assert holder.lives
    assert Run(directory).state == "running"
    assert read_json(other.status)["state"] == "running", "nobody writes into a copy"


def test_a_status_that_names_somebody_elses_process_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("labkit.runs.run.OVERTIME_S", 0.2)
    victim = subprocess.Popen(["sleep", "60"])
    try:
        named = identity(victim.pid)
        directory = record(tmp_path, "one", state="running", boot=boot_id(), supervisor=named, launcher=named)
        with pytest.raises(TimeoutError):
            Run(directory).stop(0)
        starting = record(tmp_path, "two", state="starting", boot=boot_id(), launcher=named)
        assert Run(starting).stop(0).state == "stopped"
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


def test_a_holder_that_does_not_obey_is_ended_with_its_children(
    running: tuple[RunDirectory, Holder], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, holder = running
    monkeypatch.setattr("labkit.runs.run.OVERTIME_S", 0.2)
    assert Run(directory).stop(0).state == "failed"
    assert holder.process.wait(5) == -signal.SIGKILL
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.killpg(holder.process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("its child is still there")


def test_a_frozen_supervisor_does_not_answer_and_is_ended(
    running: tuple[RunDirectory, Holder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "NO_ANSWER_S", 0.3)
    monkeypatch.setattr(status, "FROZEN_S", 1.0)
    directory, holder = running
    run = Run(directory)
    run.state  # noqa: B018  (a first look)
    os.kill(holder.process.pid, signal.SIGSTOP)
    deadline = time.monotonic() + 5
    while not (notice := run.status.get("notice")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "has not answered" in str(notice)
    assert run.wait(10).state == "failed"
    assert "the supervisor did not answer" in (run.cause or {})["message"]
    assert not holder.lives


def test_a_reader_that_was_frozen_itself_ends_nothing(
    running: tuple[RunDirectory, Holder], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, holder = running
    os.kill(holder.process.pid, signal.SIGSTOP)
    run = Run(directory)
    assert run.state == "running"
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 3600)
    assert run.state == "running"
    assert liveness.silence(directory) < 2
    assert holder.lives


@pytest.mark.parametrize("damage", ["", '{"state": "run', '{"state": "flying"}', None])
def test_a_damaged_status_does_not_end_a_living_run(running: tuple[RunDirectory, Holder], damage: str | None) -> None:
    directory, _ = running
    directory.status.unlink()
    if damage is not None:
        directory.status.write_text(damage)
    run = Run(directory)
    assert run.state == "running"
    run.request_stop(0)
    assert directory.stop.exists()


@pytest.mark.parametrize("kind", ["fifo", "link", "folder", "junk"])
def test_anything_may_lie_where_the_lock_should_be(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ".alive"
    make: dict[str, Any] = {
        "fifo": lambda: os.mkfifo(path),
        "link": lambda: path.symlink_to("/dev/zero"),
        "folder": path.mkdir,
        "junk": lambda: path.write_bytes(b"\xff[" * 5000),
    }
    make[kind]()
    assert check_lock(path) is Life.UNKNOWN
    assert not liveness.end_holder(path)


def test_a_process_sees_its_own_lock_and_does_not_lose_it(tmp_path: Path) -> None:
    lock = liveness.hold(tmp_path / ".alive")
    for _ in range(3):
        assert check_lock(lock.path) is Life.ALIVE
    code = (
        "from pathlib import Path; from labkit.runs.liveness import check_lock; "
        f"print(check_lock(Path({str(lock.path)!r})).value)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "alive\n"
    lock.release(remove=True)
    assert check_lock(lock.path) is Life.UNKNOWN


def test_one_run_has_one_supervisor(running: tuple[RunDirectory, Holder]) -> None:
    with pytest.raises((BlockingIOError, PermissionError)):
        liveness.hold(running[0].alive)
