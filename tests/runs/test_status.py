"""The state of a run: one terminal state, one writer, and readers that believe nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.cli import main
from labkit.experiment.run_directory import STATES, TERMINAL, RunDirectory, read_json, write_json
from labkit.runs import Run, compare, status
from labkit.runs.processes import alive, boot_id, identity, kill, start_time
from tests.runs.record import record


def end(path: str, number: int, gate: Any) -> None:
    """One of several who want to end a run at the same moment."""
    gate.wait()
    status.update(RunDirectory(Path(path)), state=TERMINAL[number % 3], cause={"kind": "stop", "message": str(number)})


def test_of_many_who_end_a_run_one_wins(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for _ in range(5):
        directory = RunDirectory(tmp_path / str(time.monotonic_ns()))
        directory.path.mkdir()
        write_json(directory.status, {"state": "running"})
        gate = context.Barrier(4)
        ends = [context.Process(target=end, args=(str(directory.path), number, gate)) for number in range(4)]
        for process in ends:
            process.start()
        seen = set()
        while any(process.is_alive() for process in ends):
            seen.add(directory.status.read_bytes())
        for process in ends:
            process.join()
            assert process.exitcode == 0
        final = json.loads(directory.status.read_bytes())
        number = int(final["cause"]["message"])
        assert final["state"] == TERMINAL[number % 3], "state and cause come from the same writer"
        states = {json.loads(text)["state"] for text in seen}
        assert states <= {"running", final["state"]}
        assert [path.name for path in directory.path.iterdir() if path.name.startswith(".status")] == []


def test_nothing_changes_after_the_end(tmp_path: Path) -> None:
    directory = record(tmp_path, "one", state="running")
    status.update(directory, state="failed", cause=status.cause("stop", "why"))
    before = directory.status.read_bytes()
    status.update(directory, state="finished", cause=None, warnings=["late"])
    assert directory.status.read_bytes() == before
    assert json.loads(before)["ended"] == pytest.approx(time.time(), abs=60)


def test_the_end_can_be_written_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = record(tmp_path, "one", state="running")
    status.reserve(directory)
    assert directory.reserve.stat().st_size >= status.RESERVE_BYTES
    write = status.write_json

    def full_while_reserved(path: Path, data: Any) -> None:
        if directory.reserve.exists():
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(status, "write_json", full_while_reserved)
    assert status.update(directory, state="failed")["state"] == "failed"
    assert read_json(directory.status)["state"] == "failed"
    assert not directory.reserve.exists()


# -- a supervisor that is gone ----------------------------------------------------------------------------------------


@pytest.fixture
def gone() -> dict[str, Any]:
    """A process that has ended, by pid and start time."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    known = identity(process.pid)
    assert alive(known)
    process.communicate()
    assert not alive(known)
    return known


def test_whoever_looks_ends_a_run_whose_supervisor_is_gone(tmp_path: Path, gone: dict[str, Any]) -> None:
    directory = record(tmp_path, "one", state="running", boot=boot_id(), supervisor=gone)
    directory.supervisor_log.write_text("labkit: last words\n")
    run = Run(directory)
    assert run.state == "failed"
    assert run.cause is not None
    assert run.cause["kind"] == "supervisor"
    assert run.cause["log"] == ["labkit: last words"]
    assert read_json(directory.status)["state"] == "failed", "and writes it down"
    assert run.wait(1).done


def test_a_launcher_that_is_gone_counts_until_there_is_a_supervisor(tmp_path: Path, gone: dict[str, Any]) -> None:
    me = identity(os.getpid())
    lost = record(tmp_path, "lost", state="starting", boot=boot_id(), launcher=gone, supervisor=None)
    (tmp_path / "standby.log").write_text("ImportError: no torch\n")
    cause = Run(lost).cause
    assert cause is not None
    assert "launcher died before the run began" in cause["message"]
    assert cause["log"] == ["ImportError: no torch"]
    fine = record(tmp_path, "fine", state="running", boot=boot_id(), launcher=gone, supervisor=me)
    assert Run(fine).state == "running"
    waiting = record(tmp_path, "waiting", state="starting", boot=boot_id(), launcher=me, supervisor=None)
    assert Run(waiting).state == "starting"


def test_a_recycled_pid_is_not_the_old_process(tmp_path: Path) -> None:
    me = identity(os.getpid())
    old = me | {"start_time": me["start_time"] - 1}
    assert alive(me)
    assert not alive(old)
    assert kill(old) is False, "and is not killed for it"
    directory = record(tmp_path, "one", state="running", boot=boot_id(), supervisor=old)
    assert Run(directory).state == "failed"


@pytest.mark.parametrize("known", [None, {}, {"pid": None}, {"pid": "1"}, {"pid": 1}, {"pid": 0}, {"pid": -1}, "x", 5])
def test_what_names_no_process_is_not_alive_and_not_killed(known: Any) -> None:
    assert not alive(known)
    assert kill(known) is False


def test_a_zombie_is_not_alive() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    deadline = time.monotonic() + 5
    while start_time(pid) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive({"pid": pid, "start_time": 1.0})
    assert start_time(pid) is None, "it has ended, though nobody has waited for it yet"
    os.waitpid(pid, 0)


# -- directories from elsewhere ---------------------------------------------------------------------------------------


def test_a_run_of_another_machine_is_left_alone_while_it_shows_life(tmp_path: Path, gone: dict[str, Any]) -> None:
    directory = record(tmp_path, "one", state="running", boot="another boot", supervisor=gone)
    run = Run(directory)
    assert run.state == "running"
    with pytest.raises(TimeoutError, match="still running"):
        run.wait(0.1)
    old = time.time() - 3600
    os.utime(directory.status, (old, old))
    assert run.state == "running", "times of files are those of another clock"


def test_silence_is_what_this_process_has_seen_and_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "FOREIGN_SILENCE_S", 0.4)
    directory = record(tmp_path, "one", state="running", boot="another boot")
    before = directory.status.read_bytes()
    run = Run(directory)
    for number in range(8):  # longer than the bound, but something is written all the time
        write_json(directory.progress, {"ranks": [], "number": number})
        assert run.state == "running"
        time.sleep(0.1)
    assert run.wait(5).state == "failed"
    assert "no sign of life" in (run.cause or {})["message"]
    assert directory.status.read_bytes() == before
    write_json(directory.progress, {"ranks": []})
    assert run.state == "running", "it was only slow"


def test_a_clock_that_is_ahead_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = record(tmp_path, "one", state="running", boot="another boot")
    ahead = time.time() + 1e6
    monkeypatch.setattr(time, "time", lambda: ahead)
    assert Run(directory).state == "running"
    assert read_json(directory.status)["state"] == "running"


def test_a_restarted_machine_runs_nothing_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "machine", lambda: "this one")
    directory = record(tmp_path, "one", state="running", boot="the boot before", machine="this one")
    assert Run(directory).state == "failed"
    assert "restarted" in (Run(directory).cause or {})["message"]
    assert read_json(directory.status)["state"] == "running"


def test_stopping_a_run_of_another_machine_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("labkit.runs.run.OVERTIME_S", 0.2)
    monkeypatch.setenv("LABKIT_HOME", str(tmp_path))
    me = identity(os.getpid())
    directory = record(tmp_path, "one", state="running", boot="another boot", supervisor=me)
    begun = time.monotonic()
    assert main(["stop", "one", "--grace", "0"]) == 1
    assert time.monotonic() - begun < 5
    assert "still running" in capsys.readouterr().err
    assert directory.stop.exists(), "its own supervisor will read this"


def test_a_directory_that_may_only_be_read(
    tmp_path: Path, gone: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = record(tmp_path, "one", state="running", boot=boot_id(), supervisor=gone)

    def refused(*arguments: Any, **more: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(status, "update", refused)
    assert Run(directory).state == "failed"
    assert read_json(directory.status)["state"] == "running"


TORN = [
    "",
    "{",
    '{"state": "run',
    "null",
    "[]",
    "5",
    '"running"',
    '{"state": "flying"}',
    '{"state": ["running"]}',
    "\xff\xfe",
]


@pytest.mark.parametrize("text", TORN)
def test_a_status_that_cannot_be_read_counts_as_failed(text: str, tmp_path: Path) -> None:
    directory = record(tmp_path, "one")
    directory.status.write_text(text, encoding="latin-1")
    run = Run(directory)
    assert run.state == "failed"
    assert run.done
    assert "cannot be read" in (run.cause or {})["message"]
    assert (run.id, run.title) == ("one", "one")
    directory.status.unlink()
    assert run.state == "failed"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
KEYS = (
    "run_id",
    "title",
    "created",
    "boot",
    "workload",
    "layout",
    "world_size",
    "device",
    "steps",
    "warnings",
    "cause",
)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(STATES), st.dictionaries(st.sampled_from((*KEYS, "supervisor", "launcher", "ranks")), json_values)
)
def test_a_status_of_anything_can_be_listed_and_shown(
    tmp_path_factory: pytest.TempPathFactory, state: str, content: dict[str, Any]
) -> None:
    home = tmp_path_factory.mktemp("any")
    directory = record(home, "one", [0.1] * 20)
    directory.status.write_text(json.dumps(content | {"state": state}))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LABKIT_HOME", str(home))
        run = Run(directory)
        assert run.state in STATES
        assert isinstance(run.title, str)
        assert run.summary()["run_id"] == "one"
        assert str(compare([run]))
        for command in (["runs"], ["runs", "--json"], ["show", "one"], ["compare", "one"]):
            assert main(command) == 0


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(
        st.sampled_from(
            ["metrics", "step_seconds", "peak_memory_bytes", "speedup", "notes", "samples_per_second", "steps"]
        ),
        json_values,
    )
)
def test_a_summary_of_anything_can_be_shown(tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any]) -> None:
    home = tmp_path_factory.mktemp("any")
    directory = record(home, "one")
    directory.summary.write_text(json.dumps(content))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LABKIT_HOME", str(home))
        assert main(["show", "one"]) == 0


# -- finding runs -----------------------------------------------------------------------------------------------------


def test_runs_are_found_by_id_path_and_as_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABKIT_HOME", str(tmp_path))
    record(tmp_path, "b-older", created=1000)
    record(tmp_path, "a-newer", created=2000)
    (tmp_path / "runs" / "no run").mkdir()
    (tmp_path / "runs" / "a file").write_text("")
    assert [run.id for run in Run.all()] == ["b-older", "a-newer"]
    assert Run.attach().id == "a-newer"
    assert Run.attach("b-older").id == "b-older"
    assert Run.attach(tmp_path / "runs" / "b-older").id == "b-older"
    for wrong in ("", ".", "..", "../runs/b-older/nowhere", "b older", "nowhere", ".hidden", "x" * 300):
        with pytest.raises(FileNotFoundError):
            Run.attach(wrong)


def test_ids_are_readable_and_never_taken_twice(tmp_path: Path) -> None:
    made: list[str] = []
    lock = threading.Lock()

    def make() -> None:
        for _ in range(10):
            directory = RunDirectory.create("Vision dp2·<b>/../", tmp_path)
            with lock:
                made.append(directory.id)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 40
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for name in made)
    assert all((tmp_path / "runs" / name).is_dir() for name in made)


def test_json_is_replaced_never_torn(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            write_json(path, {"number": number, "text": "x" * 10_000})
            number += 1

    write_json(path, {"number": -1})
    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(300):
            assert "number" in json.loads(path.read_text())
    finally:
        stop.set()
        thread.join()
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_a_bomb_of_json_is_not_read(tmp_path: Path) -> None:
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 200_000)
    assert read_json(deep) is None
    large = tmp_path / "large.json"
    with large.open("wb") as file:
        file.truncate(65 * 2**20)
    assert read_json(large) is None
    assert read_json(tmp_path / "nowhere") is None
    assert read_json(tmp_path) is None
