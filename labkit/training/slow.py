"""A rank made slow on purpose (`launch.slowdown`): after each pass it sleeps as long as a slower machine would compute.

Waiting for others is no computing, or two slow ranks would drive each other ever slower. On a CPU the meter tells them
apart (`PassClock`). On a GPU, streams wait for collectives without telling; a backward pass takes about twice the time
of its forward pass, so what goes beyond that is taken for waiting. (In a pipeline on GPUs all of the schedule counts.)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from labkit.training.clock import CudaClock
from labkit.training.meter import Meter

Pass = Callable[..., Any]
"""`run_pass(batch, weight, last, phase)` of a model."""
BACKWARD = 2.0
"""Most computing of a backward pass, in forward passes."""


def stretched(run_pass: Pass, factor: float, device: torch.device, meter: Meter) -> Pass:
    """`run_pass` of a rank that computes `factor` times slower than it could; itself where that is 1."""
    if factor == 1:
        return run_pass
    return _on_gpu(run_pass, factor - 1, meter) if device.type == "cuda" else _on_cpu(run_pass, factor - 1, meter)


def _on_cpu(run_pass: Pass, more: float, meter: Meter) -> Pass:
    def run(batch: Any, weight: float, last: bool, phase: Callable[[str], None]) -> Any:
        loss = run_pass(batch, weight, last, phase)
        seconds = more * meter.computing()
        time.sleep(seconds)
        meter.computed(seconds)
        return loss

    return run


def _on_gpu(run_pass: Pass, more: float, meter: Meter) -> Pass:
    clock = CudaClock()

    def run(batch: Any, weight: float, last: bool, phase: Callable[[str], None]) -> Any:
        moments: dict[str, Any] = {}

        def mark(name: str) -> None:
            phase(name)
            moments[name] = clock.now()

        loss = run_pass(batch, weight, last, mark)
        moments["end"] = clock.now()
        torch.cuda.synchronize()
        forward = clock.seconds(moments["forward"], moments["backward"])
        backward = clock.seconds(moments["backward"], moments["end"])
        time.sleep(more * (forward + min(backward, BACKWARD * forward)))
        meter.computed(more * forward)  # what is compared between ranks on GPUs is the forward pass
        return loss

    return run
