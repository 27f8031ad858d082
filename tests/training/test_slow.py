"""A rank made slow on purpose computes so many times slower, and waiting does not count as computing."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from labkit.runs import Run
from labkit.training.clock import BusyClock
from labkit.training.slow import stretched
from tests.launch.helpers import events, start, tiny

FACTOR = 4.0
LOW, HIGH = 0.6 * FACTOR, 1.7 * FACTOR
"""How far off it may be on a machine that others use too."""
STEPS = 40
CPU = torch.device("cpu")


def column(run: Run, rank: int, name: str) -> np.ndarray[Any, Any]:
    return np.array([value for event in events(run, rank) if event["event"] == "steps" for value in event[name]])


def compute(seconds: float) -> None:
    """Keep this thread busy for so much processor time."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


class FakeMeter:
    """Takes down what is reported."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def computed(self, seconds: float) -> None:
        self.seconds += seconds


def test_being_busy_is_computing_and_wanting_to_but_not_waiting() -> None:
    clock = BusyClock()
    begun = clock.seconds()
    time.sleep(0.3)
    assert clock.seconds() - begun < 0.05
    begun, since = clock.seconds(), time.perf_counter()
    others = [threading.Thread(target=compute, args=(0.1,)) for _ in range(3)]
    compute(0.1)
    busy, passed = clock.seconds() - begun, time.perf_counter() - since
    assert 0.1 <= busy <= passed + 0.01
    assert not any(thread.is_alive() for thread in others)


def test_a_pass_is_stretched_by_its_computing_alone() -> None:
    clock, measured = BusyClock(), []

    def run_pass(batch: Any, weight: float, last: bool, phase: Any) -> str:
        begun = clock.seconds()
        compute(0.02)
        measured.append(clock.seconds() - begun)
        time.sleep(0.2)  # as in a collective
        return "loss"

    meter: Any = FakeMeter()
    slow = stretched(run_pass, FACTOR, CPU, meter)
    begun = time.perf_counter()
    assert slow(None, 1.0, True, None) == "loss"
    took, busy = time.perf_counter() - begun, measured[0]
    assert took >= 0.2 + busy + meter.seconds
    assert (FACTOR - 1) * busy <= meter.seconds
    assert meter.seconds < (FACTOR - 1) * (busy + 0.1), "waiting was stretched too"


def test_a_rank_that_is_not_slowed_is_left_alone() -> None:
    def run_pass() -> None: ...

    assert stretched(run_pass, 1.0, CPU, FakeMeter()) is run_pass  # type: ignore[arg-type]


def test_an_isolated_rank_takes_so_many_times_as_long() -> None:
    """Compared by their fastest steps: whoever else uses this machine makes steps longer, never shorter."""
    run = start(tiny(ranks=2, steps=100, launch__isolated=True, launch__slowdown={1: FACTOR})).wait(120)
    assert run.state == "finished", run.cause
    normal, slowed = (float(column(run, rank, "seconds").min()) for rank in (0, 1))
    assert LOW < slowed / normal < HIGH
    said = [text for text in run.summary()["warnings"] if "on purpose" in text]
    assert said == ["launch.slowdown: rank 1 computes 4 times slower, on purpose."]


@pytest.mark.parametrize(
    ("layout", "transport"), [("dp2", "shared_memory"), ("dp2", "network"), ("tp2", "auto"), ("shard2", "auto")]
)
def test_the_straggler_is_named_though_all_steps_take_as_long(layout: str, transport: str) -> None:
    changes = {"layout": layout, "launch__transport": transport, "launch__slowdown": {1: FACTOR}}
    run = start(tiny(steps=STEPS, **changes)).wait(120)
    assert run.state == "finished", run.cause
    waits, slowed = (float(column(run, rank, "seconds").sum()) for rank in (0, 1))
    assert waits == pytest.approx(slowed, rel=0.2), "ranks wait for each other"
    summary = run.summary()
    assert summary["straggler"]["rank"] == 1
    assert LOW < summary["straggler"]["factor"] < HIGH
    assert any(note.startswith("rank 1 is the straggler: it computes ") for note in summary["notes"])
