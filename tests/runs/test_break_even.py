"""Break-even is bytes saved over extra seconds, with an interval; what saves or costs nothing has none."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from labkit.runs.break_even import MBIT, Cost, break_even, cost
from labkit.runs.data import RunData
from labkit.runs.steady import SteadyState
from tests.plots.fake_run import FakeRun, combined, drawn

MB = 2**20
POWER = "gradients.compression.method=powersgd"


def made(seconds: float, sent: float, noise: float = 0.0, seed: int = 0) -> Cost:
    random = np.random.default_rng(seed)
    return Cost(sent, SteadyState(seconds * random.lognormal(0, noise, 200), 20))


def of(*runs: FakeRun) -> Cost | None:
    pairs = []
    for one in runs:
        data = RunData(one.directory)
        data.refresh()
        pairs.append((one.experiment, data))
    return cost(pairs)


def test_it_is_where_both_take_equally_long() -> None:
    plain, method = made(0.1, 20e6), made(0.15, 1e6)
    found = break_even(plain, method)
    assert found.mbit == pytest.approx(19e6 * 8 / 0.05 / 1e6)
    assert found.low == found.high == pytest.approx(found.mbit)
    assert plain.seconds(found.mbit) == pytest.approx(method.seconds(found.mbit))
    assert plain.seconds(found.mbit / 2) > method.seconds(found.mbit / 2)
    assert plain.seconds(2 * found.mbit) < method.seconds(2 * found.mbit)


def test_noise_makes_an_interval_that_holds_it() -> None:
    found = break_even(made(0.1, 20e6, 0.05), made(0.15, 1e6, 0.05, seed=1))
    assert found.low < 19e6 / 0.05 / MBIT < found.high
    assert found.high < 1.3 * found.low


def test_extra_computing_within_the_noise_is_no_break_even() -> None:
    found = break_even(made(0.1, 20e6, 0.2), made(0.101, 1e6, 0.2, seed=1))
    assert found.mbit == found.high == math.inf
    assert 0 < found.low < math.inf, "but a rate below which it is faster is known"


def test_what_computes_no_longer_always_wins_and_what_saves_nothing_never() -> None:
    assert break_even(made(0.1, 20e6), made(0.1, 1e6)).mbit == math.inf
    assert break_even(made(0.1, 20e6), made(0.09, 1e6)).mbit == math.inf
    assert break_even(made(0.1, 20e6), made(0.2, 20e6)).mbit == 0
    assert break_even(made(0.1, 20e6), made(0.2, 30e6)).mbit == 0


def test_costs_come_from_the_runs_over_whatever_links(tmp_path: Path) -> None:
    slow = combined(tmp_path, "slow", POWER, sent=MB, compression_s=0.008, mbit=100)
    fast = combined(tmp_path, "fast", POWER, sent=MB, compression_s=0.008, mbit=None)
    found = of(slow, fast)
    assert found is not None
    assert found.bytes == 2 * MB, "both ranks share the link"
    assert found.steady.median == pytest.approx(0.028, rel=1e-4)
    measured = np.median(step_seconds(slow))
    assert found.seconds(100) == pytest.approx(measured, rel=0.1), "the formula meets the measured step"


def step_seconds(one: FakeRun) -> np.ndarray:
    data = RunData(one.directory)
    data.refresh()
    return np.asarray(data.seconds[0], dtype=np.float64)


def test_a_local_method_costs_a_part_of_its_meeting_in_each_step(tmp_path: Path) -> None:
    found = of(combined(tmp_path, "local", "gradients.update.method=local_sgd", sent=8 * MB, every=8))
    assert found is not None
    assert found.bytes == pytest.approx(2 * MB)
    assert found.steady.median == pytest.approx(0.02, rel=1e-3)


def test_between_emulated_hosts_the_busiest_link_counts(tmp_path: Path) -> None:
    one = combined(tmp_path, "hosts", POWER, sent=MB)
    one.experiment = one.experiment.set({"launch.network": {"rate_mbit": 100, "hosts": 2}})
    for rank, sent in ((0, 3e6), (1, 5e6)):
        one.event(rank, "link", interface="eth0", bytes=sent, loopback_bytes=0, seconds=1.0, updates=200)
    found = of(one)
    assert found is not None
    assert found.bytes == 5e6 / 200


def test_who_does_not_wait_for_the_link_has_no_cost_on_it(tmp_path: Path) -> None:
    assert of(drawn(tmp_path, "gossip", "gradients.update.method=gossip", stale=[1])) is None
    assert of(FakeRun(tmp_path, "bare").train(60)) is None
