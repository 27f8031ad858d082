"""The hardware of this machine, detected without importing torch and without touching CUDA.

Device counting must not create a CUDA context: a kernel that did could no longer fork, and on a shared server the
probe alone would take memory on every GPU. NVIDIA's driver is queried through `nvidia-smi`, a separate process.
"""

from __future__ import annotations

import csv
import os
import platform
import re
import shutil
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_SMI_FIELDS = "index,uuid,name,memory.total,memory.used"
SMI_TIMEOUT_S = 60
"""Timeout in seconds; eight GPUs without persistence mode take more than ten seconds to answer."""


@dataclass(frozen=True)
class Gpu:
    """One visible NVIDIA GPU; memory in bytes, as the driver reports it now."""

    index: int
    uuid: str
    name: str
    memory_bytes: int
    used_bytes: int
    capability: tuple[int, int] | None = None
    """CUDA compute capability, such as (9, 0) for Hopper; None if the driver does not report it."""


@dataclass(frozen=True)
class Machine:
    """Cores and memory that this process may actually use, and the GPUs that are visible to it."""

    cores: int
    cores_total: int
    memory_bytes: int
    gpus: tuple[Gpu, ...] = ()
    gpu_reason: str = ""
    """Why no GPU can be used; empty if one can."""
    cpu_model: str = ""
    cpu_flags: frozenset[str] = field(default_factory=frozenset, repr=False)
    system: str = ""
    torch_cuda: str = ""
    """CUDA version for which the installed torch was built; empty for a CPU build."""

    @classmethod
    def here(cls) -> Machine:
        """Return this machine, probed once per process."""
        return _probe()

    def device(self, requested: str) -> str:
        """Return `requested`, with `auto` replaced by cuda if a GPU is visible, else by cpu."""
        return ("cuda" if self.gpus else "cpu") if requested == "auto" else requested

    def slots(self, device: str) -> int:
        """Return how many ranks can have a device of their own: the number of GPUs, or of cores."""
        return len(self.gpus) if device == "cuda" else self.cores

    @property
    def gpu_numbers(self) -> tuple[int, ...]:
        """Numbers of the visible GPUs in nvidia-smi, in the order of CUDA; empty if one is a slice (MIG)."""
        slices = any(gpu.uuid.startswith("MIG-") for gpu in self.gpus)
        return () if slices else tuple(gpu.index for gpu in self.gpus)

    @property
    def capability(self) -> tuple[int, int] | None:
        """Lowest compute capability of the GPUs; None without a GPU, or if the driver does not report it."""
        capabilities = [gpu.capability for gpu in self.gpus if gpu.capability is not None]
        return min(capabilities) if capabilities and len(capabilities) == len(self.gpus) else None

    def lacks_capability(self, needs: str, least: tuple[int, int]) -> str:
        """Return why the GPUs here have less than a compute capability; empty if all have it.

        `needs` begins the sentence, e.g. "fp8 needs".
        """
        if not self.gpus:
            return f"{needs} a GPU ({self.gpu_reason})"
        if self.capability is not None and self.capability >= least:
            return ""
        lowest = "unknown" if self.capability is None else "{}.{}".format(*self.capability)
        return f"{needs} a GPU of compute capability {least[0]}.{least[1]} or more, the lowest here is {lowest}"

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        data["cpu_flags"] = sorted(flag for flag in self.cpu_flags if flag.startswith(("avx", "amx", "sse4", "fma")))
        return data


@lru_cache(maxsize=1)
def _probe() -> Machine:
    model, flags = _cpu()
    gpus, reason = _gpus()
    if gpus and not _torch_cuda():
        gpus, reason = (), "there is a GPU, but the installed torch is a build for CPUs: install one for CUDA"
    return Machine(
        cores=_usable_cores(),
        cores_total=os.cpu_count() or 1,
        memory_bytes=_usable_memory(),
        gpus=gpus,
        gpu_reason=reason,
        cpu_model=model,
        cpu_flags=flags,
        torch_cuda=_torch_cuda(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
    )


def _usable_cores() -> int:
    """Return the usable cores: the smallest of CPU_LIMIT (JupyterHub), the cgroup quota and the affinity mask."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    limits = [float(cores)]
    try:
        limits.append(float(os.environ["CPU_LIMIT"]))
    except (KeyError, ValueError):
        pass
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        limits.append(int(quota) / int(period))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        pass
    return max(1, int(min(limits)))


def _usable_memory() -> int:
    """Return the usable memory in bytes: the least of MEM_LIMIT (JupyterHub), the cgroup limit and physical memory."""
    try:
        limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (ValueError, OSError):
        limits = []
    limit_texts = [os.environ.get("MEM_LIMIT", "")]
    with suppress(OSError):
        limit_texts.append(Path("/sys/fs/cgroup/memory.max").read_text())
    for text in limit_texts:
        with suppress(ValueError):  # "max" is no limit
            limits.append(int(text))
    return min(limits, default=0)


def _cpu() -> tuple[str, frozenset[str]]:
    """Return the model name and the feature flags of the CPU, as /proc/cpuinfo reports them."""
    model, flags = platform.processor(), frozenset[str]()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                model = value.strip()
            elif name.strip() in ("flags", "Features"):
                flags = frozenset(value.split())
                break
    except OSError:
        pass
    return model, flags


def _gpus() -> tuple[tuple[Gpu, ...], str]:
    """Return the GPUs that CUDA would show, in its order, or the reason why there are none."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return (), "no NVIDIA driver on this machine (nvidia-smi not found)"
    try:
        answer = subprocess.run(
            [smi, f"--query-gpu={_SMI_FIELDS}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=SMI_TIMEOUT_S,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return (), f"nvidia-smi does not answer ({type(error).__name__})"
    capabilities = _capabilities(smi)
    gpus = []
    for line in csv.reader(answer.splitlines(), skipinitialspace=True):
        index, uuid, *names, total, used = line
        name = ", ".join(names)  # nvidia-smi quotes nothing, and a name may contain a comma
        gpus.append(Gpu(int(index), uuid, name, _mebibytes(total), _mebibytes(used), capabilities.get(uuid)))
    return visible(tuple(gpus), os.environ.get("CUDA_VISIBLE_DEVICES"))


def _capabilities(smi: str) -> dict[str, tuple[int, int]]:
    """Return the compute capabilities by UUID.

    This is a separate query, because drivers before 2021 do not know the field and would reject the whole query.
    """
    command = [smi, "--query-gpu=uuid,compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    rows = re.findall(r"^(\S+), *(\d+)\.(\d+) *$", answer, re.M)
    return {uuid: (int(major), int(minor)) for uuid, major, minor in rows}


def _torch_cuda() -> str:
    """Return the CUDA version from torch's own version file, because importing torch takes seconds."""
    spec = find_spec("torch")
    try:
        text = Path(spec.origin).with_name("version.py").read_text() if spec and spec.origin else ""
    except OSError:
        return ""
    match = re.search(r"^cuda\b[^=]*= *['\"]([\d.]+)['\"]", text, re.M)
    return match[1] if match else ""


def _mebibytes(text: str) -> int:
    """Return nvidia-smi's number of MiB in bytes, or 0 for [N/A] (memory of some integrated and MIG devices)."""
    try:
        return int(text) * 2**20
    except ValueError:
        return 0


def visible(gpus: tuple[Gpu, ...], requested: str | None) -> tuple[tuple[Gpu, ...], str]:
    """Apply CUDA_VISIBLE_DEVICES as CUDA does; return the visible GPUs and why there are none.

    The variable is a list of indices or unambiguous UUID prefixes that ends at the first invalid entry; a repeated
    entry hides all GPUs.
    """
    if not gpus:
        return (), "the NVIDIA driver reports no GPU"
    if requested is None:
        return gpus, ""
    chosen: list[Gpu] = []
    for entry in requested.split(","):
        entry = entry.strip()
        if entry.startswith("MIG-"):  # a slice of a GPU; nvidia-smi reports memory for the whole GPU only
            match = [Gpu(len(chosen), entry, "MIG device", 0, 0)]
        else:
            match = [gpu for gpu in gpus if entry and (entry == str(gpu.index) or gpu.uuid.startswith(entry))]
        if len(match) != 1:
            break
        if match[0] in chosen:
            chosen = []
            break
        chosen.append(match[0])
    return tuple(chosen), "" if chosen else f"CUDA_VISIBLE_DEVICES={requested!r} hides every GPU"
