"""Moments in time on the host or on a GPU, read without making the GPU wait."""

from __future__ import annotations

import os
import time
from typing import Any

import torch


class HostClock:
    """Moments are host seconds: on a CPU the work is done when the call returns."""

    def now(self) -> Any:
        return time.perf_counter()

    def passed(self, moment: Any) -> bool:
        """Has the device reached this moment?"""
        return True

    def seconds(self, begin: Any, end: Any) -> float:
        return float(end - begin)


class CudaClock:
    """Moments are CUDA events on the current stream; they are read only after the device has passed them."""

    def now(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def passed(self, moment: Any) -> bool:
        return bool(moment.query())

    def seconds(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1000


class PassClock:
    """How long the thread that made it computes in one pass forward and backward; waiting for others is left out.

    Its processor time tells, because a thread that waits in a collective sleeps. Where cores are short it computes more
    slowly than that: how much, shows the forward pass, by the time in which the thread was ready but had no core (the
    scheduler's statistics; Linux). In the backward pass it would also count how late the thread woke up.
    """

    def __init__(self) -> None:
        try:
            self._statistics = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._statistics = -1
        self._begun = self._delayed = 0.0
        self._stretch = 1.0

    def _delay(self) -> float:
        """Seconds so far in which the thread was ready to run but had no core."""
        return int(os.pread(self._statistics, 100, 0).split()[1]) / 1e9 if self._statistics >= 0 else 0.0

    def forward(self) -> None:
        """The pass begins."""
        self._begun, self._delayed = time.thread_time(), self._delay()

    def backward(self) -> None:
        """Its second half begins."""
        ran = max(time.thread_time() - self._begun, 1e-6)
        self._stretch = 1 + (self._delay() - self._delayed) / ran

    def seconds(self, spun: float = 0.0) -> float:
        """Computing since the pass began; of its processor time, `spun` seconds went into waiting."""
        return max(0.0, time.thread_time() - self._begun - spun) * self._stretch


def clock(device: torch.device) -> HostClock | CudaClock:
    """The clock of a device."""
    return CudaClock() if device.type == "cuda" else HostClock()
