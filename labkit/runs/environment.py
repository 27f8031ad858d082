"""What a run ran on: versions, devices, effective flags, git state. Written once per run by its supervisor."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from labkit.experiment import Machine

PACKAGES = (
    "labkit",
    "torch",
    "accelerate",
    "numpy",
    "safetensors",
    "pydantic",
    "transformers",
    "datasets",
    "highway-env",
)
# An allow-list: a run directory is shared, and the environment may hold tokens.
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "LABKIT_STANDBY")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter; a missing one is left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_state(directory: str) -> dict[str, Any] | None:
    """Commit of the working directory and whether it has changes; None outside a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", directory, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def describe(directory: str) -> dict[str, Any]:
    """The content of `environment.json`."""
    return {
        "host": socket.gethostname(),
        "machine": Machine.here().to_dict(),
        "versions": versions(),
        "executable": sys.executable,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "git": git_state(directory),
    }
