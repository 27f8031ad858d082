"""What the commands do when the request is right: output, JSON, exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from labkit.cli import main
from labkit.experiment import Experiment
from labkit.experiment.recipes import RECIPES
from labkit.runs import Run
from labkit.runs.processes import alive
from tests.launch.helpers import FAULTY, events, processes, steps_written, tiny, wait_until

SUMMARY_KEYS = {
    *("run_id", "status", "layout", "world_size", "device", "steps", "loss", "accuracy", "samples_per_second"),
    *("step_seconds", "time_to_first_step_seconds", "communication", "peak_memory_bytes", "effective"),
    *("baseline_run_id", "speedup", "efficiency", "ceiling"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patched:
        path = tmp_path_factory.mktemp("commands") / "home"
        patched.setenv("LABKIT_HOME", str(path))
        yield path


@pytest.fixture(scope="module")
def file(home: Path) -> str:
    """A tiny experiment on two ranks, as a file."""
    home.mkdir(exist_ok=True)
    path = home / "tiny.json"
    wanted = tiny(steps=30, training__evaluate_every=10, training__checkpoint_every=10)
    path.write_text(wanted.to_json())
    return str(path)


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    """Exit code, and the JSON in the last line of standard output."""
    capsys.readouterr()
    code = main([*arguments, "--json"])
    out = capsys.readouterr().out.splitlines()
    return code, json.loads(out[-1])


@pytest.fixture(scope="module")
def measured(file: str) -> dict[str, Any]:
    """`labkit run --baseline measure` on two ranks: the summary."""
    done = subprocess.run(
        [sys.executable, "-m", "labkit", "run", file, "--baseline", "measure", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1, "progress goes to standard error"
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_run_prints_the_summary(measured: dict[str, Any]) -> None:
    assert set(measured) >= SUMMARY_KEYS
    assert (measured["status"], measured["world_size"], measured["layout"]) == ("finished", 2, "dp2")
    assert measured["steps"] == len(measured["loss"]) == 30
    assert [step for step, _ in measured["loss"]] == list(range(1, 31))
    assert 0 < measured["step_seconds"]["p10"] <= measured["step_seconds"]["median"] <= measured["step_seconds"]["p90"]
    assert 0 < measured["time_to_first_step_seconds"] < 60
    assert measured["effective"]["dtype"] == "float32"
    assert measured["effective"]["backend"] == "gloo"
    assert all(peak > 2**20 for peak in measured["peak_memory_bytes"])
    assert measured["communication"]["bytes_per_step"] > 0


def test_a_measured_baseline_is_named(measured: dict[str, Any]) -> None:
    base = Run.attach(measured["baseline_run_id"])
    assert base.experiment.layout.world_size == 1
    assert base.experiment.training.global_batch == 12
    if measured["speedup"] is not None:  # else it says why
        assert measured["efficiency"] == pytest.approx(measured["speedup"] / 2)
        low, high = measured["speedup_interval"]
        assert low <= measured["speedup"] <= high
    else:
        assert measured["notes"]


def test_the_bytes_of_a_ring_all_reduce(measured: dict[str, Any]) -> None:
    """Two ranks send 2 · (2 - 1) / 2 = 1 times the gradients: four bytes a parameter."""
    start = next(event for event in events(Run.attach(measured["run_id"]), 0) if event["event"] == "start")
    assert measured["communication"]["bytes_per_step"] == 4 * start["parameters"]


def test_runs_show_compare_report(measured: dict[str, Any], home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = run_json(capsys, "runs")
    assert code == 0
    assert [row["run_id"] for row in rows] == [measured["baseline_run_id"], measured["run_id"]]
    code, shown = run_json(capsys, "show")
    assert code == 0
    assert shown["status"]["run_id"] == measured["run_id"]
    assert Experiment.from_dict(shown["experiment"]).layout.dp_replicate == 2
    code, compared = run_json(capsys, "compare", "--all")
    assert code == 0
    assert compared["baseline_run_id"] == measured["baseline_run_id"]
    assert [row["is_baseline"] for row in compared["rows"]] == [True, False]
    for command in (["runs"], ["show"], ["compare", "--all"]):
        assert main(command) == 0
        assert measured["run_id"] in capsys.readouterr().out
    assert main(["show", str(home / "runs" / measured["run_id"])]) == 0


def test_resume_goes_on(measured: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    code, summary = run_json(capsys, "run", "--resume", measured["run_id"], "--set", "training.steps=33")
    assert code == 0
    assert summary["steps"] == 33
    assert [step for step, _ in summary["loss"]] == [31, 32, 33]


def test_validate(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", file]) == 0
    assert capsys.readouterr().out.startswith("This can run here.")
    code, found = run_json(capsys, "validate", file, "--set", "layout=cp2")
    assert code == 2
    assert found["valid"] is False
    assert found["problems"][0]["field"] == "layout.cp"
    code, found = run_json(capsys, "validate", file, "--set", "sparsity.target=0.5")
    assert (code, found["valid"]) == (0, True)
    assert any("no effect" in warning for warning in found["warnings"])


def test_recipes_and_fields(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = run_json(capsys, "recipes")
    assert code == 0
    assert found == {name: make().to_dict() for name, make in RECIPES.items()}
    code, described = run_json(capsys, "fields")
    assert code == 0
    assert {"training.steps", "layout.dp_replicate", "workload.width"} <= {field["name"] for field in described}
    assert main(["recipes"]) == main(["fields"]) == 0


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["run", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
        assert "labkit" in capsys.readouterr().out


def test_a_failed_run_gives_exit_code_1_and_the_cause(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workload = json.dumps({"name": "custom", "path": f"{FAULTY}:raises"})
    arguments = ["run", "--set", f"workload={workload}", "--set", "training.global_batch=12", "--json"]
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert "labkit: failed: rank 1 raised ValueError: the data of this rank is bad" in err
    summary = json.loads(out.splitlines()[-1])
    assert summary["status"] == "failed"
    assert summary["cause"]["rank"] == 1


def test_check_gives_exit_code_by_its_verdict(home: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["--steps", "3", "--precision", "fp64", "--set", "workload.image_size=16"]
    code, found = run_json(capsys, "check", file, *wanted)
    assert code == 0
    assert found["parity"] is True
    assert found["max_loss_difference"] <= found["tolerance"] == 1e-9
    assert found["steps"] == 3
    workload = json.dumps({"name": "custom", "path": f"{FAULTY}:cannot_be_built"})
    assert main(["check", "--set", f"workload={workload}", "--steps", "2"]) == 1
    err = capsys.readouterr().err
    assert "the check could not be made: cannot_be_built raised RuntimeError: no such data here (faulty.py, line" in err


def test_a_detached_run_goes_on_and_stop_ends_it(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "labkit", "run", file, "--set", "training.steps=1000000", "--detach"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    run = Run.attach(done.stdout.strip())
    wait_until(lambda: steps_written(run, 0) > 0, 60, "steps after its command has ended")
    known = processes(run)
    code, states = run_json(capsys, "stop", "--all")
    assert (code, states) == (0, {run.id: "stopped"})
    assert not any(alive(entry) for name, entry in known.items() if name != "supervisor")
    code, states = run_json(capsys, "stop", run.id)
    assert (code, states) == (0, {run.id: "stopped"}), "stopping twice does no harm"


def test_ctrl_c_stops_the_run_with_a_checkpoint(file: str) -> None:
    before = {run.id for run in Run.all()}
    command = [sys.executable, "-m", "labkit", "run", file, "--set", "training.steps=1000000", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        run = wait_until(lambda: next((run for run in Run.all() if run.id not in before), None), 30, "the run")
        wait_until(lambda: steps_written(run, 0) > 0, 60, "steps")
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "Traceback" not in err
    summary = json.loads(out.splitlines()[-1])
    assert summary["status"] == "stopped"
    assert run.checkpoints()[-1] == summary["steps"]


def test_a_closed_pipe_is_no_error(file: str) -> None:
    command = f"{sys.executable} -m labkit fields | head -1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


@pytest.mark.slow
def test_doctor(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = run_json(capsys, "doctor")
    topics = {finding["topic"] for finding in found["findings"]}
    assert {"cores", "memory", "torch", "runs", "standby", "namespaces"} <= topics
    assert found["machine"]["cores"] >= 1
    assert found["versions"]["torch"]
    assert code == (0 if all(finding["fine"] is not False for finding in found["findings"]) else 1)


def test_a_sweep_runs_every_combination_and_goes_on(file: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = home / "sweep.html"
    command = ["sweep", file, "--set", "layout=dp1", "--name", "seeds", "--over", "training.seed=[0,1]"]
    command += ["--over", 'sparsity=[{"method":"none"},{"method":"rigl"}]', "-o", str(report)]
    code, found = run_json(capsys, *command)
    assert code == 0, found
    assert [point["state"] for point in found["points"]] == ["finished", "refused"] * 2
    assert report.stat().st_size > 10_000
    again_code, again = run_json(capsys, *command)
    assert again_code == 0
    assert [point["run"] for point in again["points"]] == [point["run"] for point in found["points"]], (
        "nothing runs twice"
    )
