"""Stretches of time added up, on the host or on a GPU that runs behind it."""

from __future__ import annotations

import time
from typing import Any, Protocol


class Clock(Protocol):
    """Moments on the device that computes (labkit.training.clock)."""

    def now(self) -> Any: ...

    def passed(self, moment: Any) -> bool: ...

    def seconds(self, begin: Any, end: Any) -> float: ...


class Stopwatch:
    """Adds up stretches; those that a GPU has not passed yet count from when it has. No clock: the host's."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock, self._seconds = clock, 0.0
        self._open: list[tuple[Any, Any]] = []

    def now(self) -> Any:
        """The beginning of a stretch."""
        return time.perf_counter() if self._clock is None else self._clock.now()

    def add(self, begun: Any) -> None:
        """A stretch from then to now."""
        if self._clock is None:
            self._seconds += time.perf_counter() - begun
        else:
            self._open.append((begun, self._clock.now()))

    @property
    def seconds(self) -> float:
        """All so far."""
        while self._open and self._clock is not None and self._clock.passed(self._open[0][1]):
            self._seconds += self._clock.seconds(*self._open.pop(0))
        return self._seconds
