"""What ends a run whose ranks hold different weights, or go their own ways: nothing hangs, nothing stays."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from labkit.launch import launch
from tests.launch import matrix_task
from tests.launch.helpers import ENDLESS, Watched, start, steps_written, tiny

APART: list[dict[str, Any]] = [
    {"method": "local_sgd", "every": 40},
    {"method": "post_local_sgd", "every": 30, "switch": 0.0},
    {"method": "diloco", "every": 30},
    {"method": "streaming_diloco", "every": 30, "delay": 5},
    {"method": "delayed", "delay": 10},
    {"method": "gossip", "graph": "complete", "every": 30},
    {"method": "gossip", "graph": "ring", "every": 15},
]
"""Rules under which ranks may be far ahead of the first one."""
RULES: list[dict[str, Any]] = [
    {"method": "local_sgd", "every": 4},
    {"method": "streaming_diloco"},
    {"method": "delayed"},
    {"method": "parameter_server"},
    {"method": "parameter_server", "staleness": 0},
    {"method": "hogwild"},
    {"method": "gossip"},
]


def named(rule: dict[str, Any]) -> str:
    return "-".join(map(str, rule.values()))


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("rule", RULES, ids=named)
def test_a_killed_rank_ends_the_run_by_name(rule: dict[str, Any], victim: int) -> None:
    with Watched(start(tiny(3, ENDLESS, gradients__update=rule))) as watch:
        ranks = watch.begun()
        os.kill(ranks[f"rank {victim}"]["pid"], signal.SIGKILL)
        cause = watch.ends("failed", within=10, kind="signal")
    assert cause["rank"] == victim


LEFT: list[dict[str, Any]] = [
    {"gradients.update": {"method": "hogwild"}},
    {"gradients.update": {"method": "gossip"}},
    {"gradients.update": {"method": "local_sgd", "every": 4}},
    {"gradients.update": {"method": "parameter_server"}},
    {"gradients.compression": {"method": "topk"}},
    {"gradients.compression": {"method": "powersgd", "rank": 1}},
]


@pytest.mark.parametrize("method", LEFT, ids=lambda method: next(iter(method.values()))["method"])
def test_a_rank_that_leaves_with_the_code_of_a_stop_ends_the_run_by_name(
    method: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """issue 11, F3: the innocent rank was named, or the run went on for ever."""
    monkeypatch.setenv("LABKIT_FAULT", json.dumps({"rank": 1, "when": "forward", "how": "_exit 75", "at": 10}))
    workload = {"name": "custom", "path": f"{Path(matrix_task.__file__)}:make_task"}
    with Watched(start(tiny(2, ENDLESS, workload=workload, launch__timeout_s=8).set(method))) as watch:
        cause = watch.ends("failed", within=30)
    assert cause["rank"] == 1
    assert "rank 1 left with exit code 75 before it was done" in cause["message"]


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_stop_saves_what_all_have_done_and_a_resumed_run_goes_on_from_there(rule: dict[str, Any]) -> None:
    wanted = tiny(3, ENDLESS, gradients__update=rule, training__checkpoint_every=None)
    with Watched(start(wanted)) as watch:
        watch.begun()
        assert watch.run.stop().state == "stopped"
    (done,) = watch.run.checkpoints()
    assert done > 0
    again = launch(watch.run.experiment.replace(f"training.steps={done + 4}"), resume=watch.run, baseline=None)
    assert again.result(timeout=60)["steps"] == done + 4
    assert np.isfinite(again.data().loss).all()
    assert again.data().first == done


@pytest.mark.parametrize("rule", APART, ids=named)
def test_stop_reaches_ranks_that_are_ahead_in_time(rule: dict[str, Any]) -> None:
    """Rank 0 hears of it first, and is the slowest; all have to end after the same update."""
    wanted = tiny(4, ENDLESS, gradients__update=rule, training__checkpoint_every=None, launch__slowdown={"0": 10})
    with Watched(start(wanted)) as watch:
        watch.begun()
        assert watch.run.stop(grace=30).state == "stopped"
        assert watch.run.cause is not None
        assert watch.run.cause["message"] == "stopped on request", "nobody was ended by force"
    (done,) = watch.run.checkpoints()
    assert [steps_written(watch.run, rank) for rank in range(4)] == [done] * 4


def test_a_killed_stage_ends_an_asynchronous_pipeline_by_name() -> None:
    layout = {"layout": {"pp": 3, "schedule": "pipedream"}}
    workload = {"workload": {"name": "vision", "image_size": 8, "width": 4, "depth": 1, "shift": 0}}
    with Watched(start(tiny(steps=ENDLESS, **layout, **workload))) as watch:
        ranks = watch.begun()
        os.kill(ranks["rank 1"]["pid"], signal.SIGKILL)
        assert watch.ends("failed", within=10, kind="signal")["rank"] == 1
