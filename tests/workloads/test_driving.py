from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from labkit.workloads import driving_data
from labkit.workloads.driving import Driving
from labkit.workloads.expert import FASTER, IDLE, LANE_WIDTH, LEFT, SLOWER, expert_action
from tests.workloads.helpers import assert_split_equals_whole, evaluate, reasons, train

SMALL = {"width": 64, "depth": 2, "episodes": 4}


def seen(lane: int, speed: float, *others: tuple[float, int, float]) -> np.ndarray:
    """An observation of the driver and others at (metres ahead, lanes to the right, metres per second faster)."""
    rows = np.zeros((8, 5), dtype=np.float32)
    rows[0] = (1, 0, lane * LANE_WIDTH, speed, 0)
    for row, (x, lanes, faster) in zip(rows[1:], others, strict=False):
        row[:] = (1, x, lanes * LANE_WIDTH, faster, 0)
    return rows


@pytest.mark.parametrize(
    ("observation", "action"),
    [
        (seen(2, 20), FASTER),  # a free road
        (seen(2, 30), IDLE),
        (seen(2, 30, (30, 0, -8)), LEFT),  # a slow car ahead, the lane beside is free
        (seen(2, 30, (30, 0, -8), (0, -1, 0)), SLOWER),  # a slow car ahead, another beside
    ],
)
def test_the_expert_does_the_reasonable(observation: np.ndarray, action: int) -> None:
    assert expert_action(observation) == action


def test_the_recording_is_small_plain_and_varied() -> None:
    path = driving_data.FOLDER / "driving.npz"
    assert path.stat().st_size < 1_500_000
    arrays, about = driving_data.load()
    samples = about["samples"]
    assert arrays["seen"].shape == (samples, 8, 5)
    assert arrays["seen"].dtype == np.float16
    assert np.isfinite(arrays["seen"]).all()
    assert set(np.unique(arrays["action"])) == set(range(5))
    assert about["majority_share"] < 0.7
    assert min(about["action_share"]) > 0.03
    assert about["drivers"]["expert"]["crash_rate"] < 0.1 < 0.6 < about["drivers"]["random"]["crash_rate"]


def test_other_episodes_are_held_out() -> None:
    arrays, about = driving_data.load()
    task = Driving.build(SMALL, 0)
    held_out = arrays["episode"] >= about["first_test_episode"]
    assert len(task.test) == held_out.sum()
    assert len(task.train) == about["train_samples"] == (~held_out).sum()
    assert 0.15 < held_out.mean() < 0.25
    actions = arrays["action"][held_out]
    assert task.facts()["majority_share"] == pytest.approx(np.bincount(actions).max() / len(actions))


def test_what_the_network_sees_is_about_one_in_size() -> None:
    task = Driving.build(SMALL, 0)
    x = task.train.__getitems__(range(len(task.train)))["x"]
    assert x.shape[1] == 40
    assert x.abs().max() < 10
    assert 0.1 < x.std() < 1.5


def test_gradients_of_a_split_batch_average_to_those_of_the_whole() -> None:
    task = Driving.build(SMALL, 0)
    assert_split_equals_whole(task, task.train.__getitems__(range(7)), [4, 2, 1])


def test_the_chain_of_blocks_is_the_network() -> None:
    task = Driving.build(SMALL, 0)
    assert list(task.model.blocks) == ["surroundings", "layer_0", "layer_1", "head"]
    x = task.test.__getitems__(range(3))["x"]
    step = x
    for block in task.model.blocks.values():
        step = block(step)
    assert torch.equal(step, task.model(x))


def test_the_order_of_the_other_vehicles_means_nothing() -> None:
    task = Driving.build(SMALL, 0)
    x = task.test.__getitems__(range(20))["x"]
    rows = x.unflatten(1, (8, 5))
    shuffled = rows[:, [0, 4, 2, 7, 1, 3, 6, 5]].flatten(1)
    torch.testing.assert_close(task.model(shuffled), task.model(x))


@pytest.fixture(scope="module")
def trained() -> tuple:
    task = Driving.build(SMALL, 0)
    train(task, 150, 128, 5e-3)
    return task, evaluate(task)


def test_it_learns_more_than_the_majority_action(trained: tuple) -> None:
    task, result = trained
    assert result["accuracy"] > task.facts()["majority_share"] + 0.1


def test_the_closed_loop_is_the_same_each_time_and_for_each_number_of_ranks(trained: tuple) -> None:
    task, _ = trained
    model = nn.Sequential(task.model)
    model.train()
    alone = task.closed_loop(model, 0, 1, seed=3)
    assert model.training
    ranks = [task.closed_loop(model, rank, 3, seed=3) for rank in range(3)]
    assert {key: sum(rank[key] for rank in ranks) for key in alone} == pytest.approx(alone)
    assert alone["episodes"] == 4
    assert 0 < alone["distance_m"] / alone["episodes"] <= 20 * 30
    metrics = task.metrics({"count": 10.0, "loss": 1.0, "correct": 5.0} | alone)
    assert metrics["distance_m"] == alone["distance_m"] / 4
    assert metrics["crash_rate"] == alone["crashes"] / 4


def test_more_ranks_than_episodes_and_no_episodes(trained: tuple) -> None:
    task, _ = trained
    idle = task.closed_loop(task.model, 7, 8, seed=0)
    assert idle == {"episodes": 0.0, "distance_m": 0.0, "crashes": 0.0}
    none = Driving.build(SMALL | {"episodes": 0}, 0)
    assert none.closed_loop(none.model, 0, 1, seed=0) == {}
    assert set(none.metrics({"count": 2.0, "loss": 1.0, "correct": 1.0})) == {"loss", "accuracy"}


def test_the_closed_loop_takes_a_float64_network() -> None:
    task = Driving.build(SMALL | {"episodes": 1}, 0)
    assert task.closed_loop(task.model.double(), 0, 1, seed=0)["episodes"] == 1


def test_the_recorder_makes_the_same_again(tmp_path: Path) -> None:
    pytest.importorskip("highway_env")
    from labkit.workloads.record_driving import record

    again = record(2)
    arrays, about = driving_data.load()
    from importlib.metadata import version

    if about["versions"] != {name: version(name) for name in about["versions"]}:
        pytest.skip("recorded with other versions of the simulator")
    count = len(again["action"])
    for name in arrays:
        assert np.array_equal(again[name], arrays[name][:count]), name
    driving_data.write(tmp_path / "a", again, {"x": 1})
    driving_data.write(tmp_path / "b", again, {"x": 1})
    assert (tmp_path / "a" / "driving.npz").read_bytes() == (tmp_path / "b" / "driving.npz").read_bytes()
    assert json.loads((tmp_path / "a" / "driving.json").read_text()) == {"x": 1}


def test_what_cannot_be_built_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reasons({"name": "driving"}) == []
    (reason,) = reasons({"name": "driving"}, global_batch=1_000_000)
    assert reason.startswith("training.global_batch: the training set has")
    monkeypatch.setattr("labkit.workloads.driving.find_spec", lambda name: None)
    (reason,) = reasons({"name": "driving"})
    assert reason.startswith("workload.episodes: the simulated road needs highway-env: pip install highway-env")
