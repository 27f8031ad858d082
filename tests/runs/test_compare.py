"""Comparison: a speed-up names a baseline that fits, or says why there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from labkit.experiment import ExperimentError
from labkit.experiment.run_directory import RunDirectory
from labkit.runs import Run, compare
from labkit.runs.compare import find_baseline
from labkit.runs.summarize import summarize
from tests.runs.record import record


def noisy(median: float, steps: int = 60, seed: int = 0) -> list[float]:
    return (median * np.random.default_rng(seed).lognormal(0, 0.02, steps)).tolist()


def row(comparison: Any, name: str) -> dict[str, Any]:
    return next(row for row in comparison.rows if row["run_id"] == name)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


def test_speedup_efficiency_and_throughput(home: Path) -> None:
    base = record(home, "one", noisy(0.1))
    two = record(home, "two", noisy(0.05, seed=1), "layout=dp2")
    found = compare([base, two])
    assert found.baseline_run_id == "one"
    one_row, two_row = found.rows
    assert (one_row["speedup"], one_row["is_baseline"]) == (1.0, True)
    assert two_row["speedup"] == pytest.approx(2, rel=0.05)
    assert two_row["speedup_low"] <= two_row["speedup"] <= two_row["speedup_high"]
    assert two_row["efficiency"] == two_row["speedup"] / 2
    assert two_row["samples_per_second"] == pytest.approx(64 / 0.05, rel=0.05)
    assert (two_row["metric"], two_row["final"], two_row["loss"]) == ("accuracy", 0.9, 0.5)
    assert two_row["ceiling"] is None, "not measured, so not shown"
    assert two_row["notes"] == []
    assert "2 ranks train 2.0" in found.text()
    assert "baseline one" in found.text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ("training.global_batch=32", "different global batch"),
        ("training.seed=1", "different seed"),
        ("workload.width=8", "different workload"),
        ("quantization.training=fp64", "different precision"),
        ("launch.threads_per_rank=2", "different threads per rank"),
        ("launch.device=cuda", "different device"),
    ],
)
def test_what_differs_makes_no_claim(changes: str, said: str, home: Path) -> None:
    base = record(home, "one", noisy(0.1))
    two = record(home, "two", noisy(0.05), f"layout=dp2 {changes}")
    for found in (compare([base, two]), compare([two], baseline=base)):
        two_row = row(found, "two")
        assert two_row["speedup"] is None
        assert two_row["efficiency"] is None
        assert two_row["notes"] == [f"{said} than the baseline"]
        assert said in found.text()


def test_too_few_steps_make_no_claim(home: Path) -> None:
    base = record(home, "one", noisy(0.1))
    short = record(home, "two", noisy(0.05, steps=9), "layout=dp2")
    found = compare([base, short])
    assert row(found, "two")["speedup"] is None
    assert "not enough steps" in found.text()
    assert found.text().startswith("No speed-up can be claimed")


def test_too_much_noise_makes_no_claim(home: Path) -> None:
    base = record(home, "one", noisy(0.1))
    wild = np.random.default_rng(0).lognormal(-3, 2.0, 30).tolist()
    found = compare([base, record(home, "two", wild, "layout=dp2")])
    assert row(found, "two")["speedup"] is None
    assert "too noisy to claim" in found.text()


def test_without_a_baseline_no_claim(home: Path) -> None:
    found = compare([record(home, "two", noisy(0.05), "layout=dp2")])
    assert found.rows[0]["speedup"] is None
    assert found.baseline_run_id is None
    assert "run it on one rank" in found.text()


def test_runs_taken_in_turn_are_set_against_the_baseline_next_to_them(home: Path) -> None:
    """A B A B on a machine that becomes slower: the speed-up does not change."""
    runs = [
        record(home, "a1", noisy(0.10, seed=1), created=1000),
        record(home, "b1", noisy(0.05, seed=2), "layout=dp2", created=1001),
        record(home, "a2", noisy(0.20, seed=3), created=2000),
        record(home, "b2", noisy(0.10, seed=4), "layout=dp2", created=2001),
    ]
    found = compare(runs)
    for name, base in (("b1", "a1"), ("b2", "a2")):
        assert row(found, name)["baseline_run_id"] == base
        assert row(found, name)["speedup"] == pytest.approx(2, rel=0.05)
    assert row(compare(runs, baseline=runs[0]), "b2")["speedup"] == pytest.approx(1, rel=0.05)


def test_the_named_baseline_counts_for_all_others(home: Path) -> None:
    slow = record(home, "slow", noisy(0.2), created=1000)
    fast = record(home, "fast", noisy(0.1), created=5000)
    two = record(home, "two", noisy(0.05), "layout=dp2", created=5001)
    found = compare([fast, two], baseline=slow)
    assert [one["run_id"] for one in found.rows] == ["slow", "fast", "two"], "the baseline is shown too"
    assert row(found, "two")["speedup"] == pytest.approx(4, rel=0.05)
    assert row(found, "fast")["speedup"] == pytest.approx(2, rel=0.05)
    assert [one["is_baseline"] for one in found.rows] == [True, False, False]


@pytest.mark.parametrize("what", ["layout=dp2", "gradients.accumulation=4"])
def test_only_one_process_in_one_pass_can_be_the_baseline(home: Path, what: str) -> None:
    other = record(home, "other", noisy(0.1), what)
    four = record(home, "four", noisy(0.05), "layout=dp4")
    with pytest.raises(ExperimentError, match="cannot be a baseline"):
        compare([four], baseline=other)
    found = row(compare([other, four]), "four")
    assert found["speedup"] is None
    assert found["baseline_run_id"] is None


def test_a_run_named_twice_counts_once(home: Path) -> None:
    base = record(home, "one", noisy(0.1))
    two = record(home, "two", noisy(0.05), "layout=dp2")
    found = compare([base, base, two, two])
    assert [one["run_id"] for one in found.rows] == ["one", "two"]
    assert "median" not in found.text()


def test_the_ceiling_is_what_independent_copies_reach(home: Path) -> None:
    base = record(home, "one", noisy(0.1))
    copies = record(home, "copies", noisy(0.06), "layout=dp2 launch.isolated=true")
    other = record(home, "other", noisy(0.01), "layout=dp4 launch.isolated=true")
    two = record(home, "two", noisy(0.065), "layout=dp2")
    found = compare([base, copies, other, two])
    assert row(found, "two")["ceiling"] == pytest.approx(0.1 / 0.06, rel=0.05)
    assert row(found, "two")["speedup"] < row(found, "two")["ceiling"]
    assert row(found, "copies")["is_ceiling"] is True
    assert row(found, "copies")["final"] is None, "copies that do not train together have no accuracy"
    assert "where the machine allows" in found.text()
    assert row(found, "one")["ceiling"] is None
    slowed = record(home, "slowed", noisy(0.2), 'layout=dp2 launch.isolated=true launch.slowdown={"1":4}')
    again = compare([base, two, copies, other, slowed])
    assert row(again, "two")["ceiling"] == row(found, "two")["ceiling"], "a slowed machine is another one"


def test_rates_of_copies_that_never_wait_add_up(home: Path) -> None:
    """A rank that takes four times as long gives a quarter of its rate: 1 + 1/4 of two ranks' rates."""
    copies = record(home, "copies", [0.1] * 40, 'layout=dp2 launch.isolated=true launch.slowdown={"1":4}')
    path = copies.events(1)
    path.write_text(path.read_text().replace("0.1", "0.4"))
    assert row(compare([copies]), "copies")["samples_per_second"] == pytest.approx(64 / 0.1 * 1.25 / 2)


def test_the_table_for_people(home: Path) -> None:
    found = compare([record(home, "one", noisy(0.1)), record(home, "two", noisy(0.05), "layout=dp2")])
    text = str(found)
    assert "one (baseline)" in text
    assert "accuracy" in text
    assert found.table().loc["two", "world_size"] == 2
    assert all(len(line) < 200 for line in text.splitlines())


def test_the_latest_fitting_baseline_is_found(home: Path) -> None:
    record(home, "old", noisy(0.1), created=1000)
    record(home, "newer", noisy(0.1), created=2000)
    record(home, "failed", noisy(0.1), created=3000, state="failed")
    record(home, "other", noisy(0.1), "training.seed=5", created=4000)
    record(home, "elsewhere", noisy(0.1), created=5000)
    (home / "runs" / "elsewhere" / "environment.json").write_text('{"host": "there"}')
    (home / "runs" / "broken").mkdir()
    (home / "runs" / "broken" / "experiment.json").write_text("{")
    two = record(home, "two", noisy(0.05), "layout=dp2", created=6000)
    found = find_baseline(two)
    assert found is not None
    assert found.id == "newer"
    summary = summarize(two)
    assert summary.baseline_run_id == "newer"
    assert summary.speedup == pytest.approx(2, rel=0.05)
    assert summary.speedup_interval is not None
    low, high = summary.speedup_interval
    assert low <= summary.speedup <= high
    assert summarize(two, baseline=None).speedup is None
    assert summarize(two, baseline=None).baseline_run_id is None
    assert find_baseline(record(home / "empty", "two", noisy(0.05), "layout=dp2")) is None


def test_a_run_that_has_just_begun_or_is_broken(home: Path) -> None:
    record(home, "nothing", None, "layout=dp2", state="starting")
    found = compare([RunDirectory(home / "runs" / "nothing")])
    assert found.rows[0]["samples_per_second"] is None
    assert "nothing" in str(found)
    broken = home / "runs" / "broken"
    broken.mkdir()
    (broken / "experiment.json").write_text("[]")
    with pytest.raises(ExperimentError):
        compare([broken])
    with pytest.raises(FileNotFoundError):
        compare([home / "nowhere"])


def test_summary_of_a_run_that_has_just_begun(home: Path) -> None:
    run = Run(record(home, "nothing", None, "layout=dp2", state="starting"))
    summary = run.summary()
    assert (summary["steps"], summary["loss"], summary["samples_per_second"]) == (0, [], None)
    assert "not enough steps" in summary["notes"][0]


def test_a_long_loss_curve_is_thinned(home: Path) -> None:
    summary = summarize(record(home, "one", noisy(0.1, steps=5000)))
    steps = [step for step, _ in summary.loss]
    assert len(steps) == 200
    assert (steps[0], steps[-1]) == (1, 5000)
    assert summary.step_seconds.warmup_steps == 20
    assert summary.step_seconds.samples == 4980
