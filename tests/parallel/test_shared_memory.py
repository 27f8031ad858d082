"""Gradients through shared memory: the same sums as through the network, and nobody waits for a rank that is gone."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from labkit.launch import launch
from labkit.runs.data import RunData
from tests.launch.helpers import ENDLESS, start, tiny


def losses(ranks: int, transport: str, bucket_mb: float) -> tuple[np.ndarray, RunData]:
    wanted = tiny(ranks, 6, launch__transport=transport, gradients__bucket_mb=bucket_mb, gradients__accumulation=2)
    run = launch(wanted.replace("quantization.training=fp64"), baseline=None)
    run.result(timeout=120)
    return run.data().loss, run.data()


@pytest.mark.parametrize(("ranks", "bucket_mb"), [(2, 25.0), (3, 0.001), (4, 25.0)])
def test_it_adds_up_what_the_network_does(ranks: int, bucket_mb: float) -> None:
    shared, data = losses(ranks, "auto", bucket_mb)
    sent, other = losses(ranks, "network", bucket_mb)
    assert np.abs(shared - sent).max() < 1e-12
    assert data.rank_starts[0]["effective"]["exchange"] == "shared memory"
    assert other.rank_starts[0]["effective"]["exchange"] == "process group"
    assert data.communication is not None
    assert other.communication is not None
    assert data.communication["bytes_per_step"] == other.communication["bytes_per_step"]
    assert data.communication["exposed_seconds_per_step"] > 0


def test_one_rank_exchanges_nothing() -> None:
    _, data = losses(1, "auto", 25.0)
    assert data.rank_starts[0]["effective"]["exchange"] == "none"


@pytest.mark.parametrize("loader_workers", [0, 1])
def test_a_rank_whose_peer_has_ended_knows_it_at_once_and_names_the_right_one(loader_workers: int) -> None:
    run = start(tiny(3, ENDLESS, training__loader_workers=loader_workers))
    while run.data().steps < 3:
        time.sleep(0.02)
    begun = time.monotonic()
    os.kill(run.status["ranks"][1]["pid"], signal.SIGKILL)
    run.wait(15)
    assert time.monotonic() - begun < 8
    assert run.state == "failed"
    assert run.cause["rank"] == 1
    assert "SIGKILL" in run.cause["message"]
    assert any("connection closed by peer" in run.logs(rank) for rank in (0, 2))


def test_nothing_of_it_has_a_name_any_more() -> None:
    run = start(tiny(2, ENDLESS))
    while run.data().steps < 3:
        time.sleep(0.02)
    files = [os.readlink(path) for path in Path(f"/proc/{run.status['ranks'][0]['pid']}/fd").iterdir() if path.exists()]
    pipes = [name for name in files if "-to-" in name]
    run.stop()
    assert not [name for name in pipes if not name.endswith("(deleted)")]
