"""A step falls into its parts: what is exposed is taken out of the span in which it lies, whatever the method."""

from __future__ import annotations

from pathlib import Path

import pytest

from labkit.runs import compare
from labkit.runs.data import RunData
from labkit.runs.split import BY_CPU_TIME, BY_DDP_MEAN, MEASURED, Split, split
from tests.plots.fake_run import FakeRun, combined, drawn

MB = 2**20
LOCAL = "gradients.update.method=local_sgd"


def of(one: FakeRun) -> Split:
    data = RunData(one.directory)
    data.refresh()
    found = split(data, one.experiment)
    assert found is not None
    return found


def ms(found: Split) -> dict[str, float]:
    parts = ("data", "compute", "compression", "exposed", "optimizer")
    return {part: 1000 * (getattr(found, part) or 0.0) for part in parts}


def test_gradients_travel_in_the_backward_pass(tmp_path: Path) -> None:
    found = of(combined(tmp_path, "int8", "gradients.compression.method=int8", sent=5 * MB, compression_s=0.012))
    travels = 1000 * 2 * 5 * MB * 8 / 200e6
    expected = {"data": 1, "compute": 18, "compression": 12, "exposed": travels, "optimizer": 1}
    assert ms(found) == pytest.approx(expected, rel=1e-4)
    assert found.total == pytest.approx(0.032 + travels / 1000, rel=1e-4)
    assert (found.bytes, found.formula_bytes, found.source) == (5 * MB, 5 * MB, MEASURED)


def test_weights_travel_beside_the_optimizer_and_count_over_whole_periods(tmp_path: Path) -> None:
    found = of(combined(tmp_path, "local", LOCAL, sent=20 * MB, every=8))
    travels = 1000 * 2 * 20 * MB * 8 / 200e6
    expected = {"data": 1, "compute": 18, "compression": 0, "exposed": travels / 8, "optimizer": 1}
    assert ms(found) == pytest.approx(expected, rel=1e-3)
    assert found.bytes == pytest.approx(20 * MB / 8)


def test_a_local_method_is_not_faster_than_its_meetings_allow(tmp_path: Path) -> None:
    """The median of single steps would leave out the one step in eight that takes 0.8 s."""
    one = combined(tmp_path, "one", ranks=1, sent=0, mbit=None)
    local = combined(tmp_path, "local", LOCAL, sent=10 * MB, every=8)
    rows = compare([one.directory, local.directory]).rows
    travels = 2 * 10 * MB * 8 / 200e6 / 8
    assert rows[1]["step_seconds"] == pytest.approx(0.02 + travels, rel=0.1)
    assert (rows[0]["method"], rows[1]["method"]) == ("plain", "local_sgd")


def test_drawn_work_is_the_mean_over_the_ranks(tmp_path: Path) -> None:
    one = drawn(tmp_path, "gossip", "gradients.update.method=gossip", stale=[1])
    expected = {"data": 1, "compute": 17, "compression": 0, "exposed": 1, "optimizer": 1}
    assert ms(of(one)) == pytest.approx(expected, rel=1e-6)


def two(root: Path, device: str, **columns: float) -> FakeRun:
    """Plain averaging by DDP, which tells a mean of 6 ms only."""
    one = FakeRun(root, "two")
    one.event(0, "start", device=device, pid=1, threads=1, parameters=1000, first=0)
    one.advance(60, exposed=float("nan"), compression=0.0, bytes=100, **columns)
    for rank in range(2):
        one.event(rank, "communication", bytes_per_step=100, exposed_seconds_per_step=0.006)
    return one.end("finished")


def test_where_ddp_does_not_tell_the_clock_of_computing_does(tmp_path: Path) -> None:
    found = of(two(tmp_path, "cpu:0", compute=0.012))
    assert found.source == BY_CPU_TIME
    assert ms(found) == pytest.approx(
        {"data": 1, "compute": 11, "compression": 0, "exposed": 4, "optimizer": 1}, rel=1e-5
    )


def test_and_on_gpus_its_mean(tmp_path: Path) -> None:
    found = of(two(tmp_path, "cuda:0", compute=0.006))
    assert found.source == BY_DDP_MEAN
    assert ms(found)["exposed"] == pytest.approx(6)


def test_what_nobody_measured_is_not_made_up(tmp_path: Path) -> None:
    one = FakeRun(tmp_path, "bare").train(60)
    found = of(one)
    assert found.exposed is None
    assert found.bytes is None
    assert ms(found)["compute"] == pytest.approx(15, rel=1e-5)
    alone = of(FakeRun(tmp_path, "alone", ranks=1).train(60))
    assert alone.exposed == 0, "one rank waits for nobody"


def test_too_few_steps_have_no_split(tmp_path: Path) -> None:
    one = FakeRun(tmp_path, "short").advance(3)
    data = RunData(one.directory)
    data.refresh()
    assert split(data, one.experiment) is None
