"""From the launch to the last process: what others see meanwhile, and what becomes of a run in odd hands."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from labkit.experiment.failures import message_of, original_message
from labkit.experiment.run_directory import RunDirectory, read_json, write_json
from labkit.launch import client, launch, standby_pid, warm
from labkit.runs import Run, status
from labkit.runs.processes import alive, identity
from tests.launch.helpers import ENDLESS, Watched, faulty, start, steps_written, tiny, wait_until


def test_a_run_is_never_visible_without_its_status(monkeypatch: pytest.MonkeyPatch, labkit_home: Path) -> None:
    seen: list[str] = []

    def written(path: Path, data: object) -> None:
        if path.name == "experiment.json":
            seen.append(read_json(path.with_name("status.json"))["state"])
        write_json(path, data)

    monkeypatch.setattr(client, "write_json", written)
    run = start(tiny(steps=3))
    assert seen == ["starting"]
    assert run.wait(60).state == "finished"


def test_a_standby_that_freezes_with_an_order_fails_the_run_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "FROZEN_S", 1.0)
    warm(120)
    standby = client._standby
    assert standby is not None
    os.kill(standby.process.pid, signal.SIGSTOP)
    with monkeypatch.context() as patched:
        patched.setattr(client.Standby, "takes_orders", property(lambda self: self.alive))
        run = launch(tiny(steps=3), baseline=None)
    assert run.wait(20).state == "failed"
    assert "is stopped by a signal" in (run.cause or {})["message"]
    os.kill(standby.process.pid, signal.SIGCONT)  # it takes the order now, finds the end written, and leaves
    other = launch(tiny(steps=3), baseline=None)
    assert other.wait(60).state == "finished"
    assert run.state == "failed"
    assert steps_written(run, 0) == 0


def test_a_frozen_standby_is_replaced() -> None:
    warm(120)
    before = standby_pid()
    assert before is not None
    os.kill(before, signal.SIGSTOP)
    run = launch(tiny(steps=3), baseline=None)
    assert standby_pid() != before
    assert run.wait(120).state == "finished"


def test_an_order_that_cannot_be_carried_out_leaves_the_standby_and_other_orders_alone() -> None:
    warm(120)
    standby = client._standby
    assert standby is not None
    os.kill(standby.process.pid, signal.SIGSTOP)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(client.Standby, "takes_orders", property(lambda self: self.alive))
        removed, innocent = launch(tiny(steps=3), baseline=None), launch(tiny(steps=3), baseline=None)
    shutil.rmtree(removed.directory.path)
    assert standby.process.stdin is not None
    standby.process.stdin.write(b"no order\n")
    standby.process.stdin.flush()
    os.kill(standby.process.pid, signal.SIGCONT)
    assert innocent.wait(60).state == "finished"
    assert standby_pid() == standby.process.pid


def test_a_supervisor_that_finds_an_end_written_ends_its_ranks() -> None:
    run = start(faulty("slow", steps=ENDLESS))
    wait_until(lambda: steps_written(run, 0) > 0, 60, "steps")
    known = [run.status["supervisor"], *run.status["ranks"]]
    status.update(run.directory, state="failed", cause=status.cause("supervisor", "somebody wrote this"))
    wait_until(lambda: not any(map(alive, known)), 15, "the end of all its processes")
    assert (run.cause or {})["message"] == "somebody wrote this"


@pytest.mark.parametrize("damage", ["", '{"state": "flying"}'])
def test_a_status_that_is_damaged_while_the_run_goes_on_is_mended(damage: str) -> None:
    run = start(faulty("slow", steps=60))
    wait_until(lambda: steps_written(run, 0) > 0, 60, "steps")
    before = run.status
    run.directory.status.write_text(damage)
    assert not run.done
    assert run.wait(60).state == "finished"
    assert {key: run.status[key] for key in ("title", "created", "ranks")} == {
        key: before[key] for key in ("title", "created", "ranks")
    }


@pytest.mark.parametrize("stopped", [True, False])
def test_the_meeting_folder_is_not_needed_after_the_set_up(stopped: bool) -> None:
    """issue 11, F9: not to stop, nor to convert and measure the trained model at the end."""
    endless = faulty("slow", steps=ENDLESS)
    short = faulty("slow", steps=150, quantization__after_training="int8_dynamic", quantization__head=True)
    with Watched(start(endless if stopped else short)) as watch:
        watch.begun()
        supervisor = watch.run.status["supervisor"]["pid"]
        folders = list(Path(tempfile.gettempdir()).glob(f"labkit-meet-{supervisor}-*"))
        for folder in folders:
            shutil.rmtree(folder)
        if stopped:
            assert watch.run.stop().state == "stopped"
        else:
            watch.ends("finished", within=60)
            assert watch.run.summary()["quantized"]["method"] == "int8_dynamic"
    assert folders


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_command_stops_its_run(number: signal.Signals, labkit_home: Path) -> None:
    words = ["run", "vision-ddp", "--set", f"training.steps={ENDLESS}", "--set", "launch.device=cpu"]
    command = subprocess.Popen([sys.executable, "-m", "labkit", *words], stderr=subprocess.DEVNULL)

    def trains() -> bool:
        return any(steps_written(run, 0) > 3 for run in Run.all())

    wait_until(trains, 150, "steps")
    run = Run.attach("last")
    supervisor = run.status["supervisor"]
    command.send_signal(number)
    assert command.wait(60) == 0
    assert run.state == "stopped"
    wait_until(lambda: not alive(supervisor), 5, "the supervisor gone")


def test_an_exception_of_a_loader_is_said_in_its_own_words() -> None:
    text = (
        "Caught ValueError in DataLoader worker process 3.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1, in f\n    raise ValueError("bad")\nValueError: bad: sample 7\nsecond line\n'
    )
    assert original_message(ValueError(text)) == "bad: sample 7 (in loader process 3)\nsecond line"
    assert original_message(ValueError("plain")) == "plain"
    gone = original_message(RuntimeError("DataLoader worker (pid(s) 32059) exited unexpectedly"))
    assert gone.startswith("loader process 32059 ended by itself")

    class Wordless(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert "RuntimeError" in message_of(Wordless())


def test_identities_of_two_processes_differ() -> None:
    assert identity(os.getpid()) != identity(os.getppid())
    assert RunDirectory(Path("/x")).alive.name == ".alive"
