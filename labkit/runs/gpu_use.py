"""How one GPU was used by a run: the figures of its history in one object, for summaries, tables and warnings."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from labkit.experiment.gpu_events import THROTTLING
from labkit.runs.columns import Floats
from labkit.runs.data import RunData
from labkit.runs.gpus import GpuHistory

UNDER_LOAD = 50.0
"""A GPU is under load in records with at least this utilisation (%); when idle it saves power on its PCIe link."""


@dataclass(frozen=True, kw_only=True)
class GpuUse:
    """What one GPU did during the run. Null means that the GPU does not report a figure."""

    title: str
    """Name for people: `GPU` and its number in nvidia-smi, or `MIG slice`."""
    name: str
    """Name of its model."""
    uuid: str
    """UUID."""
    slice: bool
    """Whether it is a slice of a GPU (MIG): all but the memory is then that of the whole GPU."""
    ranks: list[int]
    """The ranks that compute on it."""
    seconds: float
    """Time for which there are figures (s)."""
    training_seconds: float
    """Part of it after the first step began (s)."""
    utilisation_percent: float | None
    """Mean share of the training in which a kernel was running (%)."""
    utilisation_max_percent: float | None
    """Largest such share within one second (%)."""
    memory_peak_bytes: int | None
    """Largest memory in use on the card, by any process (bytes)."""
    memory_bytes: int | None
    """Memory of the card (bytes)."""
    power_watts: float | None
    """Mean power during the training (W)."""
    power_limit_watts: float | None
    """Power limit (W)."""
    energy_joules: float | None
    """Energy during the whole run (J); 3600 J are 1 Wh."""
    temperature_max_celsius: float | None
    """Highest temperature (°C)."""
    sm_clock_mhz: float | None
    """Mean clock of the multiprocessors during the training (MHz)."""
    sm_clock_max_mhz: float | None
    """Maximum of this clock (MHz)."""
    throttled_seconds: dict[str, float]
    """Seconds of the training with reduced clocks by reason: `power`, `thermal`, `power_brake` or `hardware`."""
    throttled_sm_clock_mhz: float | None
    """Mean clock of the multiprocessors in these seconds (MHz)."""
    pcie_generation: int | None
    """PCIe generation of its link under load."""
    pcie_generation_max: int | None
    """Highest PCIe generation of this GPU in this system."""
    pcie_width: int | None
    """Number of PCIe lanes of its link under load."""
    pcie_width_max: int | None
    """Largest number of PCIe lanes of this GPU in this system."""
    other_processes: int | None
    """Largest number of processes on the card that are not of this run."""
    other_bytes: int | None
    """Largest memory of these processes (bytes)."""
    reason: str
    """Why there are no figures, or no further ones; empty if there are."""

    @property
    def energy_watt_hours(self) -> float | None:
        """Energy in Wh."""
        return None if self.energy_joules is None else self.energy_joules / 3600


def gpu_uses(data: RunData) -> list[GpuUse]:
    """Return how the GPUs of a run have been used so far; empty for a run without figures of GPUs."""
    gpus = data.gpus
    return [
        _use(gpu, [rank for rank in range(data.world_size) if rank % len(gpus) == number], data.began)
        for number, gpu in enumerate(gpus)
    ]


def _use(gpu: GpuHistory, ranks: list[int], began: float | None) -> GpuUse:
    """Return the figures of one history; `began` is when the first step began (s, on the monotonic clock)."""
    facts, seconds = gpu.facts, gpu["seconds"]
    training = gpu["monotonic"] >= (math.inf if began is None else began + seconds / 2)
    loaded = training & (np.nan_to_num(gpu["utilisation"]) >= UNDER_LOAD)
    throttled = np.nansum([gpu[reason] for reason in THROTTLING], axis=0) > 0
    return GpuUse(
        title=gpu.title,
        name=facts.get("name", ""),
        uuid=facts.get("uuid", ""),
        slice=bool(facts.get("slice")),
        ranks=ranks,
        seconds=float(seconds.sum()),
        training_seconds=float(seconds[training].sum()),
        utilisation_percent=_mean(gpu["utilisation"], seconds, training),
        utilisation_max_percent=_largest(gpu["utilisation_max"]),
        memory_peak_bytes=_whole(_largest(gpu["memory_bytes"])),
        memory_bytes=facts.get("memory_bytes"),
        power_watts=_mean(gpu["power_watts"], seconds, training),
        power_limit_watts=facts.get("power_limit_watts"),
        energy_joules=_sum(gpu["energy_joules"]),
        temperature_max_celsius=_largest(gpu["temperature_celsius"]),
        sm_clock_mhz=_mean(gpu["sm_clock_mhz"], seconds, training),
        sm_clock_max_mhz=facts.get("sm_clock_mhz"),
        throttled_seconds={reason: total for reason in THROTTLING if (total := _sum(gpu[reason][training]) or 0.0) > 0},
        throttled_sm_clock_mhz=_mean(gpu["sm_clock_mhz"], seconds, training & throttled),
        pcie_generation=_whole(_largest(gpu["pcie_generation"][loaded])),
        pcie_generation_max=facts.get("pcie_generation"),
        pcie_width=_whole(_largest(gpu["pcie_width"][loaded])),
        pcie_width_max=facts.get("pcie_width"),
        other_processes=_whole(_largest(gpu["other_processes"])),
        other_bytes=_whole(_largest(gpu["other_bytes"])),
        reason=gpu.reason,
    )


def _mean(values: Floats, seconds: Floats, chosen: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> float | None:
    """Return the mean of the chosen values that are known, weighted by the time that each covers; None without any."""
    chosen = chosen & np.isfinite(values)
    return float(np.average(values[chosen], weights=seconds[chosen])) if chosen.any() else None


def _largest(values: Floats) -> float | None:
    return float(np.nanmax(values)) if np.isfinite(values).any() else None


def _sum(values: Floats) -> float | None:
    return float(np.nansum(values)) if np.isfinite(values).any() else None


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
