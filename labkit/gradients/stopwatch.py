"""A stopwatch that adds up intervals, on the host or on a GPU that runs behind it."""

from __future__ import annotations

import time
from typing import Any, Protocol


class Clock(Protocol):
    """Timestamps on the device that computes (implemented in labkit.training.clock)."""

    def now(self) -> Any:
        """Return a timestamp that the device sets when it gets there."""
        ...

    def passed(self, moment: Any) -> bool:
        """Return whether the device has passed a timestamp."""
        ...

    def seconds(self, begin: Any, end: Any) -> float:
        """Return the seconds between two timestamps, both of which the device has passed."""
        ...


class Stopwatch:
    """Sum of intervals, in host time if there is no clock; one that a GPU has not passed yet counts once it has."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock, self._seconds = clock, 0.0
        self._open: list[tuple[Any, Any]] = []

    def now(self) -> Any:
        """Return the timestamp at which an interval begins, for `add`."""
        return time.perf_counter() if self._clock is None else self._clock.now()

    def add(self, begun: Any) -> None:
        """Add the interval from `begun`, which `now` returned, to the present."""
        if self._clock is None:
            self._seconds += time.perf_counter() - begun
        else:
            self._open.append((begun, self._clock.now()))

    @property
    def seconds(self) -> float:
        """Sum of all intervals that the device has passed, in seconds."""
        while self._open and self._clock is not None and self._clock.passed(self._open[0][1]):
            self._seconds += self._clock.seconds(*self._open.pop(0))
        return self._seconds
