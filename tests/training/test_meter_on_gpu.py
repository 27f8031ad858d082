"""What the meter makes of a GPU's clock, with a clock that is made up: no GPU is asked. On the CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from labkit.training.meter import Meter
from labkit.training.shares import Shares


class GpuClock:
    """A GPU that is behind: moments are seconds of its own time, passed once `reached` has come to them."""

    def __init__(self) -> None:
        self.time = self.reached = 0.0

    def now(self) -> float:
        return self.time

    def passed(self, moment: float) -> bool:
        return moment <= self.reached

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


def metered(clock: GpuClock) -> Meter:
    quiet: Any = SimpleNamespace(progress=lambda *of_a_rank: None)
    meter = Meter(SimpleNamespace(write=lambda *event, **fields: None), 1, quiet, 0.0)  # type: ignore[arg-type]
    meter._clock, meter._device = clock, torch.device("cuda", 0)  # type: ignore[assignment]
    return meter


def step(meter: Meter, clock: GpuClock, number: int, forward: float, backward: float) -> None:
    meter.begin(number, 0.1)
    meter.phase("forward")
    clock.time += forward
    meter.phase("backward")
    clock.time += backward
    meter.loss(torch.zeros(()), 32)
    meter.end()


def test_computing_is_the_forward_passes_that_the_gpu_has_finished() -> None:
    clock = GpuClock()
    meter = metered(clock)
    step(meter, clock, 0, 0.5, 9.0)
    assert (meter.compute_seconds, meter.samples) == (0.0, 0.0)  # queued, not computed yet
    clock.reached = clock.time
    step(meter, clock, 1, 0.25, 9.0)
    assert (meter.compute_seconds, meter.samples) == (0.5, 32)
    clock.reached = clock.time
    step(meter, clock, 2, 0.25, 9.0)
    assert (meter.compute_seconds, meter.samples) == (0.25, 32)


def test_shares_follow_the_speed_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that takes three times as long gets a quarter of the batch (it got 0.2 % while no time was measured)."""
    speeds = {}

    def sum_up(tensor: torch.Tensor) -> None:
        tensor.copy_(torch.tensor([32 / 0.1, 32 / 0.3]))
        speeds["seen"] = True

    monkeypatch.setattr("labkit.training.shares.dist.get_rank", lambda: 1)
    monkeypatch.setattr("labkit.training.shares.dist.all_reduce", sum_up)
    shares = Shares(2, True, torch.device("cpu"))
    for number in range(40):
        shares.record(number, 0.3, 32)
    assert speeds["seen"]
    assert shares.weights[1] == pytest.approx(0.25, abs=0.01)
