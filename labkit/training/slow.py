"""A rank slowed down on purpose (`launch.slowdown`): after each pass it sleeps for the additional time of a slower one.

Waiting for other ranks does not count as computing; otherwise two slow ranks would slow each other down ever more. On a
CPU the meter separates the two (`PassClock`). On a GPU, the wait of a stream for a collective cannot be seen. There a
backward pass takes about twice as long as its forward pass, so any time beyond that counts as waiting. (In a pipeline
on GPUs the whole schedule counts.)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from labkit.training.clock import CudaClock
from labkit.training.meter import Meter

Pass = Callable[..., Any]
"""The function `run_pass(batch, weight, last, phase)` of a model."""
BACKWARD = 2.0
"""Maximum compute time of a backward pass, in multiples of the forward pass."""


def slow_down(run_pass: Pass, factor: float, device: torch.device, meter: Meter) -> Pass:
    """Return `run_pass`, slowed down to `factor` times its compute time; unchanged if `factor` is 1."""
    if factor == 1:
        return run_pass
    return _on_gpu(run_pass, factor - 1, meter) if device.type == "cuda" else _on_cpu(run_pass, factor - 1, meter)


def _on_cpu(run_pass: Pass, extra: float, meter: Meter) -> Pass:
    def run(batch: Any, weight: float, last: bool, phase: Callable[[str], None]) -> Any:
        loss = run_pass(batch, weight, last, phase)
        seconds = extra * meter.pass_seconds()
        time.sleep(seconds)
        meter.add_compute_seconds(seconds)
        return loss

    return run


def _on_gpu(run_pass: Pass, extra: float, meter: Meter) -> Pass:
    clock = CudaClock()

    def run(batch: Any, weight: float, last: bool, phase: Callable[[str], None]) -> Any:
        timestamps: dict[str, Any] = {}

        def mark(name: str) -> None:
            phase(name)
            timestamps[name] = clock.now()

        loss = run_pass(batch, weight, last, mark)
        timestamps["end"] = clock.now()
        torch.cuda.current_stream().synchronize()
        forward = clock.seconds(timestamps["forward"], timestamps["backward"])
        backward = clock.seconds(timestamps["backward"], timestamps["end"])
        time.sleep(extra * (forward + min(backward, BACKWARD * forward)))
        meter.add_compute_seconds(extra * forward)  # what is compared between ranks on GPUs is the forward pass
        return loss

    return run
