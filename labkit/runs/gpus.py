"""What the monitor of the GPUs recorded (gpus.jsonl), read as it grows. The file is untrusted, as all of a run is."""

from __future__ import annotations

from typing import Any

import numpy as np

from labkit.experiment.gpu_events import GPU_EVENTS, THROTTLING
from labkit.experiment.run_directory import RunDirectory
from labkit.runs.checked import checked_fields
from labkit.runs.columns import Floats, GrowingArray
from labkit.runs.reader import EventReader

MAX_RECORDS = 400_000
"""Maximum number of records that are read, over all GPUs."""
FIGURES = (
    "seconds",
    "utilisation",
    "utilisation_max",
    "memory_bytes",
    "power_watts",
    "energy_joules",
    "temperature_celsius",
    "sm_clock_mhz",
    "pcie_generation",
    "pcie_width",
    "other_processes",
    "other_bytes",
)
"""Columns of a history that are fields of the event `gpu_use`."""


class GpuHistory:
    """One GPU of a run: its facts (the event `gpu`) and one column per figure (the events `gpu_use`); NaN: unknown."""

    def __init__(self, number: int) -> None:
        self.number = number
        """Number within the run, in the order of CUDA."""
        self.facts: dict[str, Any] = {}
        """index, uuid, name, slice, memory_bytes, power_limit_watts, sm_clock_mhz, pcie_generation, pcie_width; those
        that the GPU reports.
        """
        self.reason = ""
        """Why there are no figures, or no further ones; empty while there are."""
        self._columns = {name: GrowingArray(np.float64) for name in ("monotonic", *FIGURES, *THROTTLING)}

    @property
    def records(self) -> int:
        """Number of records."""
        return self._columns["monotonic"].length

    def __getitem__(self, name: str) -> Floats:
        """Return a column: `monotonic` (end of a record, s), one of FIGURES, or the seconds by one of THROTTLING."""
        return self._columns[name].values

    def add(self, event: dict[str, Any]) -> bool:
        """Take in the checked fields of an event `gpu_use`; False if it covers no time."""
        if not event.get("seconds") or event.get("monotonic") is None:
            return False
        throttled = event.get("throttled")
        for name, column in self._columns.items():
            value = event.get(name)
            if name in THROTTLING and throttled is not None:
                value = min(max(0.0, throttled.get(name, 0.0)), event["seconds"])
            column.write(column.length, np.array([np.nan if value is None else value], np.float64), np.nan)
        return True

    @property
    def title(self) -> str:
        """Name for people: `GPU` and its number in nvidia-smi, or `MIG slice` and its number within the run."""
        if self.facts.get("slice"):
            return f"MIG slice {self.number}"
        return f"GPU {self.facts.get('index', self.number)}"


class GpuFile:
    """The file of the monitor. `read` reads what is new; nothing else touches the disk."""

    def __init__(self, directory: RunDirectory) -> None:
        self._histories: dict[int, GpuHistory] = {}
        self.reason = ""
        """Why there are no figures of any GPU; empty for a run without GPUs, and where there are some."""
        self._records = 0
        self._reader = EventReader(directory, self._handle)
        self._reader.add_file(directory.gpus)

    def read(self, budget_s: float | None = None) -> bool:
        """Read for at most about `budget_s` seconds; True when everything has been read."""
        return self._reader.read(budget_s)

    @property
    def gpus(self) -> list[GpuHistory]:
        """The GPUs in the order of CUDA."""
        return [self._histories[number] for number in sorted(self._histories)]

    @property
    def skipped_lines(self) -> int:
        """Complete lines that could not be read."""
        return self._reader.skipped_lines

    def _handle(self, _: int, event: dict[str, Any]) -> bool:
        name = event.get("event")
        declared = GPU_EVENTS.get(name) if isinstance(name, str) else None
        if declared is None:
            return False
        fields = checked_fields(declared, event)
        number = fields.get("gpu")
        if declared.name == "gpus_unknown" and number is None:
            self.reason = fields.get("reason", "")
            return True
        return number is not None and self._take(declared.name, number, fields)

    def _take(self, name: str, number: int, fields: dict[str, Any]) -> bool:
        """Take in an event of one GPU."""
        history = self._histories.setdefault(number, GpuHistory(number))
        if name == "gpu":
            history.facts = {
                key: fields[key] for key in fields if key not in ("event", "rank", "time", "monotonic", "gpu")
            }
        elif name == "gpus_unknown":
            history.reason = fields.get("reason", "")
        else:
            self._records += 1
            return self._records <= MAX_RECORDS and history.add(fields)
        return True
