"""Files of the monitor of the GPUs as it writes them, for the tests of what reads them."""

from __future__ import annotations

from typing import Any

from labkit.experiment.event_file import EventFile
from tests.plots.fake_run import FakeRun

GIB = 2**30
FACTS = {"memory_bytes": 80 * GIB, "power_limit_watts": 700, "sm_clock_mhz": 1980} | {
    "pcie_generation": 5,
    "pcie_width": 16,
}
USE = {"utilisation": 90, "utilisation_max": 99, "memory_bytes": 60 * GIB, "power_watts": 400, "energy_joules": 400} | {
    "temperature_celsius": 60,
    "sm_clock_mhz": 1900,
    "throttled": {},
    "pcie_generation": 5,
    "pcie_width": 16,
    "other_processes": 0,
    "other_bytes": 0,
}


class Clock(EventFile):
    """A file whose events happen when the test says."""

    def __init__(self, run: FakeRun) -> None:
        super().__init__(run.directory.gpus)
        self.run = run

    def add(self, event: str, at: float, **fields: Any) -> None:
        """Append an event that happened `at` seconds on the clock of the run."""
        self.append(event, **fields, monotonic=at)


def record(run: FakeRun, seconds: int, *changes: dict[str, Any], name: str = "NVIDIA H100") -> FakeRun:
    """Write what one GPU for each of `changes` did in every second of the training, `changes` as against USE."""
    file = Clock(run)
    for number, change in enumerate(changes):
        facts = FACTS | {key: change[key] for key in ("slice",) if key in change}
        file.add("gpu", 1000.0, gpu=number, index=number, uuid=f"GPU-{number}", name=name, **facts)
        figures = {key: value for key, value in (USE | change).items() if value is not None and key != "slice"}
        for second in range(1, seconds + 1):
            file.add("gpu_use", 1000.0 + second, gpu=number, seconds=1.0, **figures)
    file.close()
    return run
