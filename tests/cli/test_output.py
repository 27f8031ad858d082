"""What is said where nothing can be written or one run cannot be read; which run is the last."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from labkit.cli import main
from labkit.experiment.run_directory import RunDirectory, write_json
from labkit.launch import launch
from labkit.runs import Run
from labkit.runs.follow import summary_text
from tests.launch.helpers import SMALLEST, tiny
from tests.runs.record import record

RUN = ["run", "vision-ddp", "--set=layout.dp_replicate=1", "--set=training.steps=3", "--set=launch.device=cpu"]


def to_a_full_disk(*words: str) -> subprocess.CompletedProcess[str]:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "labkit", *words]
        return subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)


def assert_one_sentence(done: subprocess.CompletedProcess[str]) -> None:
    said = [line for line in done.stderr.splitlines() if "write" in line]
    assert said == [f"labkit: cannot write the output: {os.strerror(errno.ENOSPC)}."], done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert "None" not in done.stderr


@pytest.mark.parametrize("more", [["--json"], ["--detach"], []])
def test_a_run_whose_figures_cannot_be_printed_was_launched_all_the_same(more: list[str], labkit_home: Path) -> None:
    done = to_a_full_disk(*RUN, f"--set=workload={json.dumps(SMALLEST)}", *more)
    assert done.returncode == 1
    assert_one_sentence(done)
    assert Run.attach("last").wait(60).state == "finished"


@pytest.mark.parametrize("words", [["runs"], ["runs", "--json"], ["show"], ["recipes"], ["compare", "--all", "--json"]])
def test_figures_that_cannot_be_printed_are_one_sentence(words: list[str], labkit_home: Path) -> None:
    record(labkit_home, "20250101-0000-a-run", [0.01] * 20)
    done = to_a_full_disk(*words)
    assert done.returncode == 1
    assert_one_sentence(done)


def test_a_stop_that_cannot_be_written_is_one_sentence(
    labkit_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = launch(tiny(1, 1_000_000), baseline=None)

    def full(directory: Any, path: Path, data: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patched:
        patched.setattr("labkit.runs.status.write_even_if_full", full)
        code = main(["stop", run.id])
    err = capsys.readouterr().err
    assert code == 2
    assert err == f"labkit: {run.directory.stop}: {os.strerror(errno.ENOSPC)}.\n"
    assert not run.done, "what could not be asked to stop runs on"
    run.stop(0)


def test_a_summary_without_figures_prints_no_nan() -> None:
    text = summary_text({"run_id": "a", "layout": "dp1", "samples_per_second": float("nan"), "metrics": {"loss": 0.5}})
    assert "nan" not in text
    assert "loss" in text


# -- one run that cannot be read --------------------------------------------------------------------------------------


@pytest.fixture
def newer(labkit_home: Path) -> RunDirectory:
    """A run of a schema that this labkit does not know, between two that it knows."""
    record(labkit_home, "20250101-0000-first", [0.01] * 20, created=1000)
    directory = record(labkit_home, "20250101-0001-newer", [0.01] * 20, created=2000)
    content = json.loads(directory.experiment.read_text())
    directory.experiment.write_text(json.dumps(content | {"schema_version": 99, "telepathy": {"mode": "deep"}}))
    record(labkit_home, "20250101-0002-last", [0.01] * 20, "layout.dp_replicate=2", created=3000)
    return directory


def test_one_unreadable_run_is_left_out_of_a_comparison_by_name(
    newer: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "--all", "--json"]) == 0
    out, err = capsys.readouterr()
    content = json.loads(out.splitlines()[-1])
    assert [row["run_id"] for row in content["rows"]] == ["20250101-0000-first", "20250101-0002-last"]
    assert "20250101-0001-newer" in content["left_out"][0]
    assert "left out" in err
    assert "20250101-0001-newer" in err
    assert main(["compare", newer.id]) == 2, "asked for by name, it is refused by name"
    assert newer.id in capsys.readouterr().err


def test_one_unreadable_run_spoils_no_picture(newer: RunDirectory) -> None:
    from labkit.ui.lab import Lab

    lab = Lab("vision-ddp", ui="static")
    for run in Run.all():
        lab.attach(run)
    assert lab.picture().summary
    assert len(lab.comparison.rows) == 2


def test_a_run_of_a_newer_labkit_can_be_stopped(newer: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stop", newer.id]) == 0
    assert newer.id in capsys.readouterr().out


def test_odd_names_in_checkpoints_are_passed_over(labkit_home: Path) -> None:
    directory = record(labkit_home, "20250101-0000-odd", [0.01] * 20)
    for name in ("step-²", "step-٣", "step-", "step--1", "step-00000004", "step-7", ".step-00000005.partial", "other"):
        (directory.checkpoints / name).mkdir(parents=True)
        write_json(directory.checkpoints / name / "checkpoint.json", {})
    (directory.checkpoints / "step-00000009").symlink_to(directory.checkpoints / "step-00000004")
    assert Run(directory).checkpoints() == [4]


# -- which run is the last --------------------------------------------------------------------------------------------


def test_the_last_run_is_the_latest_also_after_the_clock_was_put_back(labkit_home: Path) -> None:
    first = launch(tiny(1, 2), baseline=None).wait(60)
    future = 4_000_000_000 * 10**9  # the clock was years ahead when the first run was made
    os.utime(first.directory.experiment, ns=(future, future))
    second = launch(tiny(1, 2), baseline=None).wait(60)
    third = launch(tiny(1, 2), baseline=None).wait(60)
    assert [run.id for run in Run.all()] == [first.id, second.id, third.id]
    assert Run.attach("last").id == third.id


def test_a_relative_home_does_not_move_with_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    code = (
        "import os, labkit\nfrom labkit.experiment.run_directory import home\nfirst = home()\n"
        "os.chdir('elsewhere')\nassert home() == first, (home(), first)\n"
        "import subprocess, sys\n"
        "ask = 'from labkit.experiment.run_directory import home; print(home())'\n"
        "again = subprocess.run([sys.executable, '-c', ask], capture_output=True, text=True).stdout.strip()\n"
        "assert again == str(first), again\nprint(first)\n"
    )
    environment = {**os.environ, "LABKIT_HOME": "runs-here", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "runs-here")


def test_an_old_name_of_a_setting_is_one_sentence() -> None:
    command = [sys.executable, "-m", "labkit", "validate", "vision-ddp", "--set", "optimizer.momentum=0.8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    warning = "labkit: optimizer.momentum is that of SGD; for AdamW set optimizer.beta1.\n"
    assert done.stderr.count(warning) == 1
    assert "FutureWarning" not in done.stderr
