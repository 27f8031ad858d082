"""Several readings of one GPU as one record: means, maxima, energy, and seconds of reduced clocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from labkit.launch.nvml import Reading

Others = Callable[[Mapping[int, int]], tuple[int, int] | None]
"""Number and memory in bytes of the processes of others among those on a GPU; None if that cannot be known."""


class Window:
    """The readings since the last record. A reading stands for the time since the one before it."""

    def __init__(self, others: Others) -> None:
        self._others = others
        self._previous: Reading | None = None
        self._clear()

    def _clear(self) -> None:
        self.seconds = 0.0
        """Time that the readings cover (s)."""
        self._sums: dict[str, tuple[float, float]] = {}
        self._largest: dict[str, float] = {}
        self._energy: float | None = None
        self._throttled: dict[str, float] | None = None

    def add(self, reading: Reading) -> None:
        """Take in a reading; of the first one only the time and the energy counter count."""
        previous, self._previous = self._previous, reading
        if previous is None:
            return
        seconds = reading.monotonic - previous.monotonic
        self.seconds += seconds
        for name in ("utilisation", "power_watts", "sm_clock_mhz"):
            self._add_to_mean(name, getattr(reading, name), seconds)
        for name in ("memory_bytes", "temperature_celsius", "pcie_generation", "pcie_width"):
            self._add_to_largest(name, getattr(reading, name))
        self._add_to_largest("utilisation_max", reading.utilisation)
        self._add_energy(previous, reading, seconds)
        if reading.throttling is not None:
            self._throttled = self._throttled or {}
            for reason in reading.throttling:
                self._throttled[reason] = self._throttled.get(reason, 0.0) + seconds
        self._add_others(reading)

    def _add_to_mean(self, name: str, value: float | None, seconds: float) -> None:
        if value is not None:
            total, weight = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = total + seconds * value, weight + seconds

    def _add_to_largest(self, name: str, value: float | None) -> None:
        if value is not None:
            self._largest[name] = max(value, self._largest.get(name, value))

    def _add_energy(self, previous: Reading, reading: Reading, seconds: float) -> None:
        """Add the energy since the previous reading, by the counter; without one, by the power."""
        if reading.energy_joules is not None and previous.energy_joules is not None:
            spent = max(0.0, reading.energy_joules - previous.energy_joules)
        elif reading.power_watts is not None:
            spent = seconds * reading.power_watts
        else:
            return
        self._energy = (self._energy or 0.0) + spent

    def _add_others(self, reading: Reading) -> None:
        others = None if reading.processes is None else self._others(reading.processes)
        if others is not None:
            self._add_to_largest("other_processes", others[0])
            self._add_to_largest("other_bytes", others[1])

    def record(self) -> dict[str, Any]:
        """Return the fields of the event `gpu_use` apart from the number of the GPU, and begin the next record."""
        means = {name: round(total / weight, 2) for name, (total, weight) in self._sums.items() if weight}
        fields: dict[str, Any] = {"seconds": round(self.seconds, 3)} | means | self._largest
        if self._energy is not None:
            fields["energy_joules"] = round(self._energy, 2)
        if self._throttled is not None:
            fields["throttled"] = {reason: round(seconds, 3) for reason, seconds in self._throttled.items()}
        self._clear()
        return fields
