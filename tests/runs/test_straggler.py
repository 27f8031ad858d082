"""The rank that computes longest is named, and what left an emulated network stands in the summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from labkit.runs.data import RunData
from labkit.runs.follow import summary_text
from labkit.runs.straggler import Straggler, straggler
from labkit.runs.summarize import summarize
from tests.runs.record import record
from tests.runs.test_data import Writer

STEPS = 40


def noisy(seconds: float, seed: int, steps: int = STEPS) -> list[float]:
    """Half to one and a half times as long, as on a busy machine."""
    moments = np.random.default_rng(seed).uniform(0.5, 1.5, steps)
    return [float(moment) for moment in seconds * moments]


def run(path: Path, compute: list[list[Any] | None]) -> RunData:
    """A run whose ranks computed for so long; None for a rank that does not tell."""
    writer = Writer(path / "run", world_size=len(compute))
    for rank, seconds in enumerate(compute):
        steps = len(seconds) if seconds is not None else STEPS
        writer.steps(rank, 0, [1.0] * steps, **({} if seconds is None else {"compute": seconds}))
    data = RunData(writer.directory)
    data.refresh()
    return data


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ([0.01, 0.01], None),
        ([0.01, 0.013, 0.01, 0.01], None),
        ([0.01, 0.04], (1, 4.0)),
        ([0.01, 0.01, 0.01, 0.04], (3, 4.0)),
        ([0.03, 0.02, 0.01, 0.01], (0, 3.0)),
        ([0.01], None),
    ],
)
def test_who_computes_longest(means: list[float], expected: tuple[int, float] | None, tmp_path: Path) -> None:
    data = run(tmp_path, [noisy(mean, seed) for seed, mean in enumerate(means)])
    for found in (straggler(data), straggler(data, last=30)):
        assert (found and found.rank) == (expected and expected[0])
        if found is not None and expected is not None:
            assert found.factor == pytest.approx(expected[1], rel=0.3)


def test_a_slow_moment_of_the_whole_machine_is_nobodys_fault(tmp_path: Path) -> None:
    moments = [1.0] * 20 + [50.0] * 20
    assert straggler(run(tmp_path, [moments, [1.2 * moment for moment in moments]])) is None


@pytest.mark.parametrize(
    "compute",
    [
        [[0.01] * STEPS, None],
        [[0.01] * 12, [0.04] * 12],  # fewer than ten after the warm-up
        [[0.0] * STEPS, [0.04] * STEPS],
        [[None] * STEPS, [0.04] * STEPS],
        [[0.01] * STEPS, ["long"] * STEPS],
    ],
)
def test_too_little_is_known(compute: list[list[Any] | None], tmp_path: Path) -> None:
    assert straggler(run(tmp_path, compute)) is None


def test_only_the_latest_steps_count_while_it_runs(tmp_path: Path) -> None:
    """A rank that has become slow is named at once."""
    data = run(tmp_path, [[0.01] * 100, [0.01] * 70 + [0.05] * 30])
    assert straggler(data) is None
    found = straggler(data, last=20)
    assert found is not None
    assert str(found) == "rank 1 is the straggler: it computes 5.0 times as long as the others (median)"


def test_the_summary_names_it_and_counts_the_link(tmp_path: Path) -> None:
    network = '{"rate_mbit":100,"hosts":2}'
    directory = record(tmp_path, "slow", [0.1] * STEPS, f"layout=dp4 launch.network={network}")
    writer = Writer.__new__(Writer)
    writer.directory = directory
    for rank in range(4):
        writer.steps(rank, STEPS, [1.0] * STEPS, compute=[0.04 if rank == 3 else 0.01] * STEPS)
    for rank, sent in ((0, 4_000_000), (2, 4_000_080)):
        writer.event(rank, "link", bytes=sent, loopback_bytes=1000, seconds=2.5, updates=80, interface="eth0")
    found = summarize(directory, baseline=None).as_dict()
    assert found["network"] == {
        "rate_mbit": 100.0,
        "delay_ms": 0.0,
        "hosts": 2,
        "bytes": 8_000_080,
        "loopback_bytes": 2000,
        "per_host": [{"bytes": 4_000_000, "loopback_bytes": 1000}, {"bytes": 4_000_080, "loopback_bytes": 1000}],
        "updates": 80,
        "bytes_per_step": 100_001.0,
        "seconds": 2.5,
    }
    assert found["straggler"] == {"rank": 3, "factor": pytest.approx(4.0)}
    assert str(Straggler(3, 4.0)) in found["notes"]
    assert "0.1 MB per step at 100 Mbit/s" in summary_text(found)


@pytest.mark.parametrize("link", [{}, {"bytes": -1}, {"bytes": "many"}, {"seconds": None}, {"updates": 1e300}])
def test_a_link_that_cannot_be_read_is_left_out(link: dict[str, Any], writer: Writer) -> None:
    whole = {"bytes": 10, "loopback_bytes": 0, "seconds": 1.0, "updates": 2}
    writer.event(0, "link", **(whole | link if link else {}))
    writer.event(1, "link", **whole)
    data = RunData(writer.directory)
    data.refresh()
    assert data.links == {1: whole}
    assert data.skipped_lines == 1


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    return Writer(tmp_path / "run")
