"""A rank made slow on purpose computes so many times slower, and waiting does not count as computing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
import torch

from labkit.runs import Run
from labkit.training.clock import PassClock
from labkit.training.slow import slow_down
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

    def __init__(self, clock: PassClock) -> None:
        self.seconds = 0.0
        self.pass_seconds = clock.seconds

    def add_compute_seconds(self, seconds: float) -> None:
        self.seconds += seconds


def test_waiting_is_no_computing() -> None:
    clock = PassClock()
    clock.forward()
    compute(0.05)
    clock.backward()
    half = clock.seconds()
    time.sleep(0.3)  # as in a collective
    assert clock.seconds() < half + 0.05
    compute(0.05)
    assert clock.seconds() >= 2 * 0.05
    assert clock.seconds(spin_wait_seconds=0.05) < clock.seconds() - 0.04


def test_a_thread_that_has_no_core_computes_more_slowly() -> None:
    """Two threads cannot both run Python code at once, so three processes on one core."""
    core = min(os.sched_getaffinity(0))
    busy = f"import os, time; os.sched_setaffinity(0, [{core}]); time.sleep(0)\nwhile True: pass"
    others = [subprocess.Popen([sys.executable, "-S", "-c", busy]) for _ in range(2)]
    mine = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, [core])
        time.sleep(0.5)
        clock = PassClock()
        clock.forward()
        compute(0.2)
        clock.backward()
        assert clock.seconds() > 1.5 * 0.2
    finally:
        os.sched_setaffinity(0, mine)
        for other in others:
            other.kill()
            other.wait()


@pytest.mark.alone
def test_a_pass_is_stretched_by_its_computing_alone() -> None:
    clock, measured = PassClock(), []

    def run_pass(batch: Any, weight: float, last: bool, phase: Any) -> str:
        clock.forward()
        compute(0.02)
        clock.backward()
        compute(0.02)
        time.sleep(0.2)  # as in a collective
        measured.append(clock.seconds())
        return "loss"

    meter: Any = FakeMeter(clock)
    slow = slow_down(run_pass, FACTOR, CPU, meter)
    begun = time.perf_counter()
    assert slow(None, 1.0, True, None) == "loss"
    took, pass_seconds = time.perf_counter() - begun, measured[0]
    assert took >= 0.2 + 0.04 + meter.seconds
    assert (FACTOR - 1) * pass_seconds <= meter.seconds < (FACTOR - 1) * pass_seconds * 1.2


def test_a_rank_that_is_not_slowed_is_left_alone() -> None:
    def run_pass() -> None: ...

    assert slow_down(run_pass, 1.0, CPU, FakeMeter(PassClock())) is run_pass  # type: ignore[arg-type]


def test_an_isolated_rank_takes_so_many_times_as_long() -> None:
    """Compared by their fastest steps: whoever else uses this machine makes steps longer, never shorter."""
    run = start(tiny(ranks=2, steps=100, launch__isolated=True, launch__slowdown={1: FACTOR})).wait(120)
    assert run.state == "finished", run.cause
    normal, slowed = (float(column(run, rank, "seconds").min()) for rank in (0, 1))
    assert LOW < slowed / normal < HIGH
    said = [text for text in run.summary()["warnings"] if "on purpose" in text]
    assert said == ["launch.slowdown: rank 1 is slowed down on purpose, by a factor of 4."]


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
    assert LOW < summary["straggler"]["factor"] < 3 * FACTOR  # it computes while the others have all gone to sleep
    assert any(note.startswith("rank 1 is the straggler: it computes ") for note in summary["notes"])
