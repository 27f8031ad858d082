"""Reports what this machine has, and which choices are unavailable on it and why."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from labkit.experiment import Machine, topology
from labkit.experiment.registry import registries, registry
from labkit.experiment.run_directory import home
from labkit.launch.client import uses_standby
from labkit.netem import rules as network
from labkit.runs.environment import links_of_gpus, versions

# Runs in a separate process: this one stays free of torch, and no CUDA context is created.
_TORCH_PROBE = """
import json, torch, torch.distributed as dist
print(json.dumps({
    "version": torch.__version__, "cuda_build": torch.version.cuda, "gloo": dist.is_gloo_available(),
    "nccl": dist.is_nccl_available(), "mkl": torch.backends.mkl.is_available(), "threads": torch.get_num_threads(),
    "cusparselt": torch.backends.cusparselt.is_available(),
}))
"""
INSTRUCTIONS = {
    "avx2": "avx2",
    "avx512f": "AVX-512",
    "avx512_vnni": "int8 (VNNI)",
    "avx512_bf16": "bf16",
    "amx_bf16": "AMX",
}

EXTRAS = {
    "lab": ("ipywidgets", "plotly", "anywidget"),
    "hub": ("datasets", "transformers"),
    "gpu": ("pynvml",),
}
"""Modules of the optional packages; pynvml is that of nvidia-ml-py, for the figures of GPUs."""


@dataclass(frozen=True)
class Finding:
    """One line of the report: a topic, a text, and whether it is fine (None: merely a fact)."""

    topic: str
    text: str
    fine: bool | None = None


def examine() -> list[Finding]:
    """Examine the machine and return the report; takes a few seconds, because torch is imported in another process."""
    return [*_hardware(), *_software(), *_launching(), *_unavailable_choices()]


def _hardware() -> list[Finding]:
    """Report cores, instructions, memory and GPUs."""
    machine = Machine.here()
    total = f" of {machine.cores_total}" if machine.cores != machine.cores_total else ""
    flags = [text for flag, text in INSTRUCTIONS.items() if flag in machine.cpu_flags]
    findings = [
        Finding("cores", f"{machine.cores}{total} usable: {machine.cpu_model}", machine.cores > 1),
        Finding("instructions", ", ".join(flags) or "none of " + ", ".join(INSTRUCTIONS.values())),
        Finding("memory", f"{machine.memory_bytes / 2**30:.1f} GiB", machine.memory_bytes > 2 * 2**30),
    ]
    for gpu in machine.gpus:
        used = f"{gpu.used_bytes / 2**30:.1f} of {gpu.memory_bytes / 2**30:.1f} GiB in use"
        findings.append(Finding(f"GPU {gpu.index}", f"{gpu.name}, {used}", True))
    if not machine.gpus:
        findings.append(Finding("GPU", f"{machine.gpu_reason}; ranks run as CPU processes over gloo"))
    elif len(machine.gpus) > 1:
        findings.append(Finding("links", _links(machine)))
    return findings


def _links(machine: Machine) -> str:
    """Return how the visible GPUs are linked, according to the driver, and which layouts that suits."""
    matrix, reason = topology.here()
    if matrix is None:
        return f"unknown ({reason})"
    return topology.in_words(matrix.within(machine.gpu_numbers) if machine.gpu_numbers else matrix)


def _software() -> list[Finding]:
    """Report versions, the build of torch, and optional packages."""
    package_versions = versions()
    findings = [Finding("versions", ", ".join(f"{name} {number}" for name, number in package_versions.items()))]
    try:
        result = subprocess.run(
            [sys.executable, "-P", "-c", _TORCH_PROBE], capture_output=True, text=True, timeout=120, check=True
        )
        torch = json.loads(result.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        return [*findings, Finding("torch", f"cannot be imported ({type(error).__name__})", False)]
    build = f"CUDA {torch['cuda_build']}" if torch["cuda_build"] else "CPU build"
    backends = [name for name in ("gloo", "nccl") if torch[name]]
    backends += ["cuSPARSELt"] if torch["cusparselt"] else []
    findings.append(Finding("torch", f"{torch['version']} ({build}), backends: {', '.join(backends)}", torch["gloo"]))
    if Machine.here().gpus and not torch["cuda_build"]:
        findings.append(Finding("torch", "there are GPUs, but this torch is a CPU build", False))
    for extra, modules in EXTRAS.items():
        missing = [name for name in modules if find_spec(name) is None]
        text = "installed" if not missing else f"{', '.join(missing)} missing: pip install 'labkit[{extra}]'"
        findings.append(Finding(f"extra {extra}", text, None if missing else True))
    return findings


def _launching() -> list[Finding]:
    """Report the home, the standby and the emulated network."""
    root = home()
    existing = next(path for path in (root, *root.parents) if path.exists())
    writable = os.access(existing, os.W_OK)
    free = shutil.disk_usage(existing).free
    standby = "on" if uses_standby() else "off (LABKIT_STANDBY=0): every run starts cold"
    return [
        Finding("runs", f"{root} ({free / 2**30:.1f} GiB free)" + ("" if writable else ", not writable"), writable),
        Finding("standby", standby),
        _emulated_network(),
    ]


def _emulated_network() -> Finding:
    """Report which settings of `launch.network` this machine supports."""
    links = network.possible()
    if links.bucket:
        return Finding("namespaces", f"links cannot be slowed down (launch.network): {links.bucket}")
    reasons = {"delay_ms": links.delay, "hosts": links.hosts}
    without = "".join(f"; no {name}: {reason}" for name, reason in reasons.items() if reason)
    return Finding("namespaces", f"allowed: links can be slowed down (launch.network){without}", True)


def _unavailable_choices() -> list[Finding]:
    """Report the choices of the form that this machine does not support."""
    findings = []
    for setting, methods in registries():
        for method in methods:
            if reason := method.missing(Machine.here()):
                findings.append(Finding(setting, f"{method.key} is unavailable here: {reason}"))
    return [*findings, kernels_for_two_four(Machine.here())]


def kernels_for_two_four(machine: Machine) -> Finding:
    """Report whether 2:4 sparsity has kernels on this machine; a rank also tests them before it trains."""
    reason = registry("sparsity")["n_m"].load().kernels_missing(machine)
    if reason:
        return Finding("sparsity.kernel", f"semi_structured is unavailable here: {reason}")
    return Finding("sparsity.kernel", "semi_structured: the GPUs should have kernels for 2:4; a rank tests them", True)


def as_dict(findings: list[Finding]) -> dict[str, Any]:
    """Return the report as a JSON object, for --json."""
    return {"findings": [{"topic": f.topic, "text": f.text, "fine": f.fine} for f in findings]} | {
        "machine": Machine.here().to_dict() | {"links": links_of_gpus()},
        "versions": versions(),
    }
