"""NVML, NVIDIA's management library, through the optional package nvidia-ml-py: what one GPU does now.

NVML creates no CUDA context and takes no memory on the GPU. What a GPU, a slice of one (MIG) or a driver does not
report is None.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from labkit.experiment.machine import Gpu

_POWER_CAP, _SLOWDOWN, _THERMAL, _HARDWARE_THERMAL, _POWER_BRAKE = 0x4, 0x8, 0x20, 0x40, 0x80
"""Bits of NVML's clock event reasons."""


class NoFigures(Exception):
    """Raised if NVML cannot report anything; the message says why in one sentence."""


@dataclass(frozen=True)
class Reading:
    """What one GPU reported at one moment; None for what it does not report."""

    monotonic: float
    """When (s, on the machine's monotonic clock)."""
    utilisation: int | None = None
    """Share of the last sample period of the driver, at most a second, in which a kernel was running (%)."""
    memory_bytes: int | None = None
    power_watts: float | None = None
    energy_joules: float | None = None
    """Energy since the driver was loaded (J)."""
    temperature_celsius: int | None = None
    sm_clock_mhz: int | None = None
    throttling: frozenset[str] | None = None
    """Why clocks are reduced now (names of labkit.experiment.gpu_events.THROTTLING)."""
    pcie_generation: int | None = None
    pcie_width: int | None = None
    processes: dict[int, int] | None = None
    """Memory in bytes by pid; 0 for a process whose memory the driver does not report."""

    @property
    def is_empty(self) -> bool:
        """Whether the GPU reported nothing at all."""
        return all(value is None for name, value in vars(self).items() if name != "monotonic")


class Nvml:
    """The library, initialised. Raises NoFigures if the package, the library or the driver is missing."""

    def __init__(self) -> None:
        try:
            self.pynvml = import_module("pynvml")
        except ImportError:
            raise NoFigures("the package nvidia-ml-py is not installed (pip install 'labkit[gpu]')") from None
        try:
            self.pynvml.nvmlInit()
        except Exception as error:
            raise NoFigures(f"NVML cannot be used: {_words(error)}") from None

    def gpu(self, gpu: Gpu) -> NvmlGpu:
        """Return the access to one visible GPU, by its UUID; raise NoFigures if NVML does not know it."""
        try:
            device = self.pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid)
        except Exception as error:
            raise NoFigures(f"NVML does not know {gpu.name} {gpu.uuid}: {_words(error)}") from None
        return NvmlGpu(self, gpu, device)

    def ask(self, function: str, *arguments: Any) -> Any:
        """Return the answer of a function of NVML; None if the driver, the package or the GPU does not have it."""
        try:
            return getattr(self.pynvml, function)(*arguments)
        except (AttributeError, self.pynvml.NVMLError):
            return None

    def close(self) -> None:
        """Release the library."""
        self.ask("nvmlShutdown")


class NvmlGpu:
    """One GPU, or one slice of a GPU: memory and processes are those of the slice, all else that of the whole GPU."""

    def __init__(self, nvml: Nvml, gpu: Gpu, device: Any) -> None:
        self._ask, self._pynvml, self._gpu, self._device = nvml.ask, nvml.pynvml, gpu, device
        self.is_slice = gpu.uuid.startswith("MIG-")
        self._whole = (
            (self._ask("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", device) or device) if (self.is_slice) else device
        )

    def facts(self) -> dict[str, Any]:
        """Return what does not change: the fields of the event `gpu` apart from its number within the run."""
        memory = self._ask("nvmlDeviceGetMemoryInfo", self._device)
        limit = self._ask("nvmlDeviceGetEnforcedPowerLimit", self._whole)
        name = self._ask("nvmlDeviceGetName", self._device)
        facts = {
            "index": None if self.is_slice else self._gpu.index,
            "uuid": self._gpu.uuid,
            "name": name.decode("utf-8", "replace") if isinstance(name, bytes) else name or self._gpu.name,
            "slice": int(self.is_slice),
            "memory_bytes": memory.total if memory else self._gpu.memory_bytes or None,
            "power_limit_watts": limit / 1000 if limit else None,
            "sm_clock_mhz": self._ask("nvmlDeviceGetMaxClockInfo", self._whole, self._pynvml.NVML_CLOCK_SM),
            "pcie_generation": self._ask("nvmlDeviceGetMaxPcieLinkGeneration", self._whole),
            "pcie_width": self._ask("nvmlDeviceGetMaxPcieLinkWidth", self._whole),
        }
        return {key: value for key, value in facts.items() if value is not None}

    def read(self) -> Reading:
        """Return what the GPU does now; takes about a millisecond, or as long as the driver needs."""
        rates = self._ask("nvmlDeviceGetUtilizationRates", self._device)
        memory = self._ask("nvmlDeviceGetMemoryInfo", self._device)
        power = self._ask("nvmlDeviceGetPowerUsage", self._whole)
        energy = self._ask("nvmlDeviceGetTotalEnergyConsumption", self._whole)
        return Reading(
            monotonic=time.monotonic(),
            utilisation=rates.gpu if rates else None,
            memory_bytes=memory.used if memory else None,
            power_watts=None if power is None else power / 1000,
            energy_joules=None if energy is None else energy / 1000,
            temperature_celsius=self._ask("nvmlDeviceGetTemperature", self._whole, self._pynvml.NVML_TEMPERATURE_GPU),
            sm_clock_mhz=self._ask("nvmlDeviceGetClockInfo", self._whole, self._pynvml.NVML_CLOCK_SM),
            throttling=self._throttling(),
            pcie_generation=self._ask("nvmlDeviceGetCurrPcieLinkGeneration", self._whole),
            pcie_width=self._ask("nvmlDeviceGetCurrPcieLinkWidth", self._whole),
            processes=self._processes(),
        )

    def _throttling(self) -> frozenset[str] | None:
        """Return why clocks are reduced; drivers before 535 know the function under its old name only."""
        bits = self._ask("nvmlDeviceGetCurrentClocksEventReasons", self._whole)
        if bits is None:
            bits = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", self._whole)
        return None if bits is None else throttling(bits)

    def _processes(self) -> dict[int, int] | None:
        """Return the processes that compute or draw on the GPU."""
        kinds: Iterable[str] = ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses")
        answers = [self._ask(kind, self._device) for kind in kinds]
        if answers[0] is None:
            return None
        return {process.pid: process.usedGpuMemory or 0 for answer in answers for process in answer or ()}


def throttling(bits: int) -> frozenset[str]:
    """Return the reasons for reduced clocks in NVML's bits; what is no reduction (idle, settings) is left out."""
    reasons = {
        "power": bits & _POWER_CAP,
        "thermal": bits & (_THERMAL | _HARDWARE_THERMAL),
        "power_brake": bits & _POWER_BRAKE,
        # This bit accompanies the more exact ones.
        "hardware": bits & _SLOWDOWN and not bits & (_HARDWARE_THERMAL | _POWER_BRAKE),
    }
    return frozenset(name for name, active in reasons.items() if active)


def _words(error: Exception) -> str:
    """Return an error of NVML as one short line."""
    return f"{str(error) or type(error).__name__}"[:200].splitlines()[0]
