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


class BusyClock:
    """How long the thread that made it has worked: the time it ran, and the time it waited for a core to run on.

    Asleep, in a collective or otherwise, it does neither. The first part comes from the processor time of the thread,
    the second from the scheduler's statistics (Linux; without them it counts as zero).
    """

    def __init__(self) -> None:
        try:
            self._statistics = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._statistics = -1

    def seconds(self) -> float:
        """So far."""
        waited = os.pread(self._statistics, 100, 0).split()[1] if self._statistics >= 0 else b"0"
        return time.thread_time() + int(waited) / 1e9


def clock(device: torch.device) -> HostClock | CudaClock:
    """The clock of a device."""
    return CudaClock() if device.type == "cuda" else HostClock()
