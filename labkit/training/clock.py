"""Moments in time on the host or on a GPU, read without making the GPU wait."""

from __future__ import annotations

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


def clock(device: torch.device) -> HostClock | CudaClock:
    """The clock of a device."""
    return CudaClock() if device.type == "cuda" else HostClock()
