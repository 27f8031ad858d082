"""What ends a run whose ranks hold different weights, or go their own ways: nothing hangs, nothing stays."""

from __future__ import annotations

import os
import signal
from typing import Any

import numpy as np
import pytest

from labkit.launch import launch
from tests.launch.helpers import ENDLESS, Watched, start, tiny

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
