"""A queue of runs: every combination once, stopped in the middle and gone on with, nothing that is done run again."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from labkit.launch.sweep import Sweep, combinations, sweep
from labkit.plots import plot_pareto
from labkit.plots.pareto import front
from tests.launch.helpers import ENDLESS, tiny

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
