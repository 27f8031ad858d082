"""Timestamps on the host or on a GPU, read without making the GPU wait."""

from __future__ import annotations

import os
import time
from typing import Any

import torch


class HostClock:
    """Clock of the host: timestamps are seconds, because on a CPU the work is done when the call returns."""

    def now(self) -> Any:
        return time.perf_counter()

    def stream(self) -> None:
        """Return None: a CPU has no streams."""

    def passed(self, timestamp: Any) -> bool:
        """Return True if the device has reached this timestamp."""
        return True

    def seconds(self, begin: Any, end: Any) -> float:
        return float(end - begin)


class CudaClock:
    """Clock of a GPU: timestamps are CUDA events on the current stream, read once the device has passed them."""

    def now(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stream(self) -> Any:
        """Return the current stream; work on other streams is not in its way."""
        return torch.cuda.current_stream()

    def passed(self, timestamp: Any) -> bool:
        return bool(timestamp.query())

    def seconds(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1000


class PassClock:
    """Measures how long the calling thread computes in one forward and backward pass, without waiting for other ranks.

    It reads the processor time of the thread, because a thread that waits in a collective sleeps. If there are fewer
    cores than threads, the thread computes more slowly than its processor time says. The forward pass shows by how
    much: the time in which the thread was ready but had no core (from the scheduler's statistics, on Linux). The
    backward pass cannot be used for this, because there that time also includes how late the thread woke up.
    """

    def __init__(self) -> None:
        try:
            self._statistics = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._statistics = -1
        self._begin = self._delay_at_begin = 0.0
        self._slowness = 1.0

    def _delay(self) -> float:
        """Return the seconds so far in which the thread was ready to run but had no core."""
        return int(os.pread(self._statistics, 100, 0).split()[1]) / 1e9 if self._statistics >= 0 else 0.0

    def forward(self) -> None:
        """Mark the beginning of the forward pass."""
        self._begin, self._delay_at_begin = time.thread_time(), self._delay()

    def backward(self) -> None:
        """Mark the beginning of the backward pass."""
        seconds = max(time.thread_time() - self._begin, 1e-6)
        self._slowness = 1 + (self._delay() - self._delay_at_begin) / seconds

    def seconds(self, spin_wait_seconds: float = 0.0) -> float:
        """Return the seconds computed since the pass began, less `spin_wait_seconds` of processor time."""
        return max(0.0, time.thread_time() - self._begin - spin_wait_seconds) * self._slowness


def clock(device: torch.device) -> HostClock | CudaClock:
    """Return the clock for a device."""
    return CudaClock() if device.type == "cuda" else HostClock()


def finish(device: torch.device) -> None:
    """Wait until a GPU has computed everything that was queued so far; do nothing on a CPU.

    It does not wait for the whole device: messages that an asynchronous pipeline has posted ahead end only when other
    ranks get further, and those may wait here, too (issue 13, fault 3).
    """
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
