"""A queue of runs: every combination once, stopped in the middle and gone on with, nothing that is done run again."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from labkit.cli import main
from labkit.experiment.run_directory import home
from labkit.launch import sweep as sweep_module
from labkit.launch.sweep import Sweep, _ProgressLine, combinations, sweep
from labkit.plots import plot_pareto
from labkit.plots.pareto import front
from labkit.runs import Run
from tests.launch.helpers import ENDLESS, SMALLEST, steps_written, tiny, wait_until

OVER: dict[str, list[Any]] = {
    "sparsity": [{"method": "none"}, {"method": "static", "target": 0.5}],
    "quantization.training": ["fp32", "fp64"],
}


def base(steps: int = 8) -> Any:
    return tiny(1, steps, training__evaluate_every=steps)


def test_every_combination_is_a_point_with_a_name_of_its_own() -> None:
    points = list(combinations(base(), OVER))
    assert [point.label for point in points] == ["none, fp32", "none, fp64", "static 0.5, fp32", "static 0.5, fp64"]
    assert points[3].experiment.sparsity.target == 0.5
    assert points[3].experiment.quantization.training == "fp64"


def test_what_is_refused_stays_with_its_reason_and_the_rest_runs() -> None:
    over = {"sparsity": [{"method": "none"}, {"method": "rigl"}]}  # rigl needs a target
    found = sweep(base(), over, "refused").run(progress=lambda _: None)
    assert [point.state for point in found.points] == ["finished", "refused"]
    assert "sparsity.target" in found.points[1].reason
    assert len(found.runs) == 1
    rows = found.table()
    assert rows[0]["accuracy"] is not None
    assert rows[1]["run"] == ""


def test_it_goes_on_where_it_stopped() -> None:
    over = {"training.seed": [0, 1, 2]}
    first = sweep(base(), over, "again")
    first.start()
    while not any(point.state == "finished" for point in first.points):
        time.sleep(0.02)
    first.stop()
    assert not first.running
    done = [point.run_id for point in first.points if point.state == "finished"]
    again = sweep(base(), over, "again")
    assert [point.run_id for point in again.points if point.state == "finished"] == done
    assert all(point.state in ("finished", "waiting") for point in again.points)
    again.run(progress=lambda _: None)
    assert [point.state for point in again.points] == ["finished"] * 3
    assert [point.run_id for point in again.points][: len(done)] == done, "nothing is run twice"
    with pytest.raises(ValueError, match="other points"):
        sweep(base(), {"training.seed": [0, 1]}, "again")


def test_stop_ends_the_run_that_goes_on() -> None:
    found = sweep(base(ENDLESS), {"training.seed": [0, 1]}, "endless").start()
    while not any(point.state == "running" for point in found.points):
        time.sleep(0.02)
    threading.Thread(target=found.stop).start()
    found.wait(60)
    assert not found.running
    assert found.points[0].state == "stopped"
    assert found.points[1].state == "waiting"
    assert sweep(base(ENDLESS), {"training.seed": [0, 1]}, "endless").points[0].state == "waiting", "it is run again"


@pytest.mark.parametrize("name", ["../up", "", "a/b", ".hidden"])
def test_a_name_is_no_path(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        Sweep.over(base(), OVER, name)


@pytest.mark.parametrize("over", [{}, {"training.seed": []}])
def test_nothing_to_run_is_an_error(over: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least one field"):
        sweep(base(), over, "empty")


def test_the_front_is_what_nobody_beats() -> None:
    points = [(1.0, 0.5), (2.0, 0.4), (3.0, 0.9), (3.0, 0.8), (0.5, 0.1), (4.0, 0.9)]
    assert front(points, higher=True) == [4, 0, 2]
    assert front([(cost, -gain) for cost, gain in points], higher=False) == [4, 0, 2]


def test_the_picture_names_the_best_run_and_every_point() -> None:
    found = sweep(base(), {"training.seed": [0, 1]}, "picture").run(progress=lambda _: None)
    for cost in ("time", "energy", "memory"):
        picture = plot_pareto(found.runs, cost)
        assert len(picture.rows) == 2
        assert {row["Run id"] for row in picture.rows} == {run.id for run in found.runs}
        assert any(row["On the front"] for row in picture.rows)
    with pytest.raises(ValueError, match="money"):
        plot_pareto(found.runs, "money")


# -- as a process of its own, which may be killed ---------------------------------------------------------------------

RATES = [0.001, 0.002, 0.003]


def words(name: str, steps: int) -> list[str]:
    fields = {
        "workload": json.dumps(SMALLEST),
        "layout.dp_replicate": 1,
        "training.steps": steps,
        "training.evaluate_every": 0,
        "training.checkpoint_every": 0,
        "launch.device": "cpu",
    }
    settings = [f"--set={field}={value}" for field, value in fields.items()]
    return ["sweep", "vision-ddp", *settings, f"--over=optimizer.lr={json.dumps(RATES)}", f"--name={name}"]


def begin(name: str, steps: int = 600) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "labkit", *words(name, steps)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def stored(name: str) -> list[dict[str, Any]]:
    try:
        points: list[dict[str, Any]] = json.loads((home() / "sweeps" / f"{name}.json").read_text())["points"]
    except FileNotFoundError:
        return []
    return points


def at_work(name: str, steps: int = 20) -> Run | None:
    """The run of a point that has done some steps."""
    running = [point["run_id"] for point in stored(name) if point["state"] == "running"]
    run = Run.attach(running[0]) if running else None
    return run if run is not None and steps_written(run, 0) >= steps else None


def finish(name: str, steps: int = 600) -> int:
    return main(words(name, steps))


def test_progress_is_printed_when_it_changes(capsys: pytest.CaptureFixture[str]) -> None:
    """A notebook keeps what is printed, and a sweep of hours asks twice a second."""
    ended, active = (SimpleNamespace(done=done, state="running", label="b") for done in (True, False))
    ended.state, points = "finished", [ended, active]
    running = SimpleNamespace(points=points, running=True)
    show = _ProgressLine()
    for _ in range(100):
        show(running)
    active.done, active.state, running.running = True, "finished", False
    show(running)
    shown = capsys.readouterr().out
    assert shown.count("\r") == 2
    assert shown.startswith("\r1/2 b")
    assert shown.rstrip(" \n").endswith("2/2")


def test_one_process_at_a_time_runs_a_sweep(labkit_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = begin("twice")
    wait_until(lambda: at_work("twice"), 60, "the first run")
    assert finish("twice") == 2
    assert "the sweep twice is being run by another process" in capsys.readouterr().err
    assert len(Run.all()) == 1, "the second one has launched nothing"
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 0, output
    assert [point["state"] for point in stored("twice")] == ["finished"] * 3
    assert len(Run.all()) == 3


def test_a_run_that_outlives_its_sweep_is_waited_for(labkit_home: Path) -> None:
    first = begin("killed")
    orphan = wait_until(lambda: at_work("killed"), 60, "the first run")
    first.kill()
    first.communicate()
    assert not orphan.done
    assert finish("killed") == 0
    assert len(Run.all()) == 3, "no point was begun twice"
    assert orphan.state == "finished"
    assert stored("killed")[0]["run_id"] == orphan.id


def test_a_run_that_its_sweep_could_not_note_is_found_again(labkit_home: Path) -> None:
    first = begin("unnoted")
    orphan = wait_until(lambda: at_work("unnoted"), 60, "the first run")
    first.kill()
    first.communicate()
    path = home() / "sweeps" / "unnoted.json"  # as if it had been killed between the launch and the note
    content = json.loads(path.read_text())
    content["points"][0] |= {"state": "waiting", "run_id": None}
    path.write_text(json.dumps(content))
    assert finish("unnoted") == 0
    assert len(Run.all()) == 3
    assert stored("unnoted")[0]["run_id"] == orphan.id


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_run_and_keeps_the_rest(number: signal.Signals, labkit_home: Path) -> None:
    process = begin("signalled", ENDLESS)
    run = wait_until(lambda: at_work("signalled"), 60, "the first run")
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert "Traceback" not in output
    assert run.state == "stopped"
    assert [point["state"] for point in stored("signalled")] == ["stopped", "waiting", "waiting"]


@pytest.mark.parametrize("content", ['{"format": 1, "poi', "", "[]", '{"points": 5}'])
def test_a_damaged_file_is_named_as_such(content: str, labkit_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = home() / "sweeps" / "damaged.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert finish("damaged") == 2
    err = capsys.readouterr().err
    assert "the file of the sweep damaged is damaged" in err
    assert str(path) in err
    assert path.read_text() == content


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("write", [3, 4])
def test_a_home_that_cannot_be_written_ends_it_in_a_sentence_and_loses_no_point(
    code: int, write: int, labkit_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    count, real = 0, sweep_module.write_json

    def fails(path: Path, data: Any) -> None:
        nonlocal count
        count += 1
        if count >= write:
            raise OSError(code, os.strerror(code), str(path))
        real(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(sweep_module, "write_json", fails)
        assert finish("full", 20) == 1
        err = capsys.readouterr().err
        assert os.strerror(code) in err
        assert "Traceback" not in err
    before = {run.id for run in Run.all()}
    assert before
    assert finish("full", 20) == 0
    assert before <= {point["run_id"] for point in stored("full")}, "what had been run was not run again"
    assert len(Run.all()) == 3


def test_a_disk_without_room_spoils_no_point(labkit_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from labkit.launch import client

    with monkeypatch.context() as patched:
        patched.setattr(client, "MIN_FREE_BYTES", 2**62)
        queue = sweep(base(), {"training.seed": [0, 1]}, "no-room").run(progress=lambda _: None)
    assert "MB are free" in queue.problem
    assert [point.state for point in queue.points] == ["waiting", "waiting"]
    assert not queue.running
