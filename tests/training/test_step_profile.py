"""One step recorded by torch.profiler: a file per rank, in every kind of loop, and no other number than without."""

from __future__ import annotations

import gzip
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from labkit.cli import main
from labkit.experiment import Experiment
from labkit.experiment.run_directory import RunDirectory
from labkit.launch import launch
from labkit.runs import Run
from labkit.training.probes import step_profile
from labkit.training.probes.step_profile import StepProfile
from tests.launch.helpers import tiny
from tests.training.test_trace import experiment

STEPS, PROFILED = 8, 6
LOOPS: dict[str, dict[str, Any]] = {
    "pipeline": {"layout": {"pp": 2, "microbatches": 2}},
    "work queue": {"layout": {"dp_replicate": 2}, "gradients.update.method": "parameter_server"},
    "sharded": {"layout": {"dp_shard": 2, "zero_stage": 3}},
    "asynchronous pipeline": {"layout": {"pp": 2, "microbatches": 2, "schedule": "pipedream"}},
    "replicas": {"layout": {"dp_replicate": 2}, "training.loader_workers": 1},
    "hogwild": {"layout": {"dp_replicate": 2}, "gradients.update.method": "hogwild"},
    "delayed": {"layout": {"dp_replicate": 2}, "gradients.update.method": "delayed"},
}


def finished(loop: str, **changes: Any) -> Run:
    layout, more = LOOPS[loop]["layout"], {key: value for key, value in LOOPS[loop].items() if key != "layout"}
    run = launch(experiment(layout, **more, **{"training.steps": STEPS}, **changes), baseline=None)
    run.result(timeout=120)
    return run


def step_of(loop: str) -> int:
    """Return an early step for a work queue, from which a slow rank may get nothing towards the end."""
    return 2 if loop in ("work queue", "hogwild") else PROFILED


@lru_cache
def profiled(loop: str) -> Run:
    return finished(loop, **{"training.profile_step": step_of(loop)})


@pytest.mark.parametrize("loop", LOOPS)
def test_every_rank_leaves_a_trace_of_that_step(loop: str) -> None:
    run = profiled(loop)
    profile = run.profile()
    assert profile.notes == []
    assert profile.step == step_of(loop)
    assert [path.name for path in profile.paths] == ["rank-0.json.gz", "rank-1.json.gz"]
    for path in profile.paths:
        names = {event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}
        assert {"aten::addmm", "aten::gelu_backward"} & names, "neither a forward nor a backward pass is in it"
        assert path.stat().st_mode & 0o777 == 0o600
    for rank in (0, 1):
        rows = [row for row in profile.rows if row.rank == rank]
        assert len(rows) == 10
        assert rows == sorted(rows, key=lambda row: -row.seconds)
        assert {row.device for row in rows} == {"CPU"}


@pytest.mark.parametrize("loop", ["pipeline", "sharded", "asynchronous pipeline"])
def test_it_changes_no_number(loop: str) -> None:
    assert np.array_equal(profiled(loop).data().loss, finished(loop).data().loss)


def test_the_first_step_can_be_profiled_although_loaders_start_in_it() -> None:
    assert len(finished("replicas", **{"training.profile_step": 1}).profile().paths) == 2


def test_it_is_left_out_of_the_steady_steps(labkit_home: Path) -> None:
    run = launch(tiny(1, 20, training__profile_step=10), baseline=None).wait(60)
    assert run.summary()["step_seconds"]["samples"] == 20 - 3 - 2  # the warm-up, this step and the next
    assert run.data().disturbed_steps == [9, 10]


def test_the_command_line_says_where_the_files_are(capsys: pytest.CaptureFixture[str]) -> None:
    run = profiled("pipeline")
    assert main(["profile", str(run.directory.path)]) == 0
    text = capsys.readouterr().out
    assert "https://ui.perfetto.dev" in text
    assert str(run.directory.profile(1)) in text
    assert "rank 1: the operations on its CPU" in text
    assert main(["profile", str(run.directory.path), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (answer["step"], len(answer["files"]), len(answer["rows"])) == (PROFILED, 2, 20)


# -- what cannot be profiled -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"training__steps": 4}, {"training__steps": None, "training__epochs": 0.05}])
def test_a_step_that_never_comes_is_refused(changes: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    wanted: Experiment = tiny(1, training__profile_step=500, **changes)
    if wanted.training.steps:
        (problem,) = wanted.problems()
        assert (problem.field, problem.nearest) == ("training.profile_step", 4)
        return
    run = launch(wanted, baseline=None).wait(60)  # only the ranks know how many steps that is
    assert run.state == "failed"
    assert run.cause is not None
    assert "training.profile_step is 500, but the run has only" in run.cause["message"]


def test_a_run_without_a_profile_is_one_sentence(labkit_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launch(tiny(1, 2), baseline=None).wait(60)
    assert main(["profile"]) == 2
    assert "training.profile_step" in capsys.readouterr().err


class Written:
    """Takes what a rank would write as events."""

    def __init__(self) -> None:
        self.fields: list[dict[str, Any]] = []

    def write(self, event: str, **fields: Any) -> None:
        self.fields.append({"event": event} | fields)


def of_one_process(path: Path, events: Written) -> StepProfile:
    return StepProfile(RunDirectory(path), 0, torch.device("cpu"), path, lambda: None, events)  # type: ignore[arg-type]


def one_step(path: Path, run: Any = lambda: torch.ones(9) @ torch.ones(9)) -> list[dict[str, Any]]:
    """Profile one step in this process; return the events that it wrote."""
    events = Written()
    directory = RunDirectory(path)
    device, scratch = torch.device("cpu"), path / "scratch"
    scratch.mkdir(exist_ok=True)
    profile = StepProfile(directory, 0, device, scratch, lambda: None, events)  # type: ignore[arg-type]
    profile.schedule(2, 0, 5)
    for step in range(5):
        with profile.step(step):
            run()
    assert list(scratch.iterdir()) == []
    return events.fields


def test_one_step_is_profiled_once(tmp_path: Path) -> None:
    (event,) = one_step(tmp_path)
    assert event["file"] == "profile/rank-0.json.gz"
    assert event["bytes"] == (tmp_path / event["file"]).stat().st_size


def test_an_active_profiler_is_left_alone_and_the_step_trains(tmp_path: Path) -> None:
    steps: list[int] = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as own:
        (event,) = one_step(tmp_path, lambda: steps.append(int(torch.ones(1).sum())))
    assert event["note"] == "this step was not profiled: another profiler is active in this process"
    assert len(steps) == 5
    assert sum(row.count for row in own.key_averages() if row.key == "aten::sum") == 5


def test_a_profiler_that_fails_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise RuntimeError("no CUPTI")

    monkeypatch.setattr(step_profile, "profile", broken)
    (event,) = one_step(tmp_path)
    assert event["note"] == "this step was not profiled: RuntimeError: no CUPTI"


def test_a_trace_that_is_too_large_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_profile, "MAX_TRACE_BYTES", 1000)
    (event,) = one_step(tmp_path)
    assert "more than" in event["note"]
    assert not (tmp_path / "profile").exists()


def test_a_link_in_the_place_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "profile").symlink_to(tmp_path / "elsewhere")
    (event,) = one_step(tmp_path)
    assert "not a folder" in event["note"]
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_step_that_fails_raises_what_it_raised(tmp_path: Path) -> None:
    def fail() -> None:
        raise KeyError("mine")

    profile = of_one_process(tmp_path, Written())
    profile.schedule(1, 0, 1)
    with pytest.raises(KeyError, match="mine"), profile.step(0):
        fail()
    assert not torch.autograd.profiler._is_profiler_enabled
    assert len(one_step(tmp_path)) == 1, "the next one can be profiled"


def test_a_resumed_run_does_not_profile_a_step_before_its_first(tmp_path: Path) -> None:
    events = Written()
    profile = of_one_process(tmp_path, events)
    profile.schedule(3, 3, 10)
    for step in range(3, 10):
        with profile.step(step):
            pass
    assert events.fields == []
