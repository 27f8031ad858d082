"""NVML as tests need it: GPUs from a file of JSON, named in FAKE_NVML, with the interface of the package nvidia-ml-py.

The file has, by UUID, the figures of each GPU. A figure that is missing is one that the GPU does not support; a list is
gone through, one item a call, and its last item stays. `children` among the processes stands for those of the caller.
`fails_after` readings of a GPU every function raises an error; `parent` makes a GPU a slice of another one.
"""

import json
import os
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0
_scenario: dict = {}
_calls: Counter = Counter()


class NVMLError(Exception):
    pass


class NVMLError_NotSupported(NVMLError):
    pass


def nvmlInit():
    _scenario.clear()
    _scenario.update(json.loads(Path(os.environ["FAKE_NVML"]).read_text()))
    if "no_driver" in _scenario:
        raise NVMLError("Driver Not Loaded")


def nvmlShutdown():
    pass


def nvmlDeviceGetHandleByUUID(uuid):
    if uuid not in _scenario["gpus"]:
        raise NVMLError("Not Found")
    return uuid


def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle):
    return _scenario["gpus"][handle]["parent"]


def _figure(handle, name):
    gpu = _scenario["gpus"][handle]
    time.sleep(_scenario.get("hangs_s", 0))
    if _calls[handle, "utilisation"] > gpu.get("fails_after", 10**9):
        raise NVMLError("GPU is lost")
    count = _calls[handle, name]
    _calls[handle, name] += 1
    if name not in gpu:
        raise NVMLError_NotSupported("Not Supported")
    value = gpu[name]
    return value[min(count, len(value) - 1)] if isinstance(value, list) else value


def nvmlDeviceGetName(handle):
    return _figure(handle, "name")


def nvmlDeviceGetUtilizationRates(handle):
    return SimpleNamespace(gpu=_figure(handle, "utilisation"), memory=0)


def nvmlDeviceGetMemoryInfo(handle):
    return SimpleNamespace(used=_figure(handle, "used"), total=_figure(handle, "total"))


def nvmlDeviceGetPowerUsage(handle):
    return _figure(handle, "milliwatts")


def nvmlDeviceGetEnforcedPowerLimit(handle):
    return _figure(handle, "limit_milliwatts")


def nvmlDeviceGetTotalEnergyConsumption(handle):
    return _figure(handle, "millijoules")


def nvmlDeviceGetTemperature(handle, sensor):
    return _figure(handle, "temperature")


def nvmlDeviceGetClockInfo(handle, kind):
    return _figure(handle, "clock")


def nvmlDeviceGetMaxClockInfo(handle, kind):
    return _figure(handle, "max_clock")


def nvmlDeviceGetCurrentClocksEventReasons(handle):
    return _figure(handle, "reasons")


def nvmlDeviceGetCurrentClocksThrottleReasons(handle):
    return _figure(handle, "old_reasons")


def nvmlDeviceGetCurrPcieLinkGeneration(handle):
    return _figure(handle, "generation")


def nvmlDeviceGetMaxPcieLinkGeneration(handle):
    return _figure(handle, "max_generation")


def nvmlDeviceGetCurrPcieLinkWidth(handle):
    return _figure(handle, "width")


def nvmlDeviceGetMaxPcieLinkWidth(handle):
    return _figure(handle, "max_width")


def nvmlDeviceGetComputeRunningProcesses(handle):
    processes = []
    for name, memory in _figure(handle, "processes").items():
        pids = _children() if name == "children" else [int(name)]
        processes += [SimpleNamespace(pid=pid, usedGpuMemory=memory) for pid in pids]
    return processes


def nvmlDeviceGetGraphicsRunningProcesses(handle):
    raise NVMLError_NotSupported("Not Supported")


def _children():
    tasks = Path("/proc/self/task").iterdir()
    return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
