"""The environment of a run: versions, devices, effective flags, git state. Written once per run by its supervisor."""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from labkit.experiment import Machine, topology
from labkit.experiment.run_directory import RunDirectory, write_json

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

GIT_TIMEOUT_S = 5.0
"""Maximum time for all calls of git (s)."""
# Turns off what a repository's own configuration may start or fetch: a file system monitor, hooks, remote objects.
_SAFE_SETTINGS = {
    "core.fsmonitor": "false",
    "core.hooksPath": os.devnull,
    "core.untrackedCache": "false",
    "protocol.allow": "never",
}
_FILTERS = r"^filter\..*\.(clean|process|required)$"
_GIT_VARIABLES = {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "GIT_NO_LAZY_FETCH": "1"}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter; missing packages are left out."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def git_state(directory: str) -> dict[str, Any] | None:
    """Return the commit of the working directory and whether it has changes; None outside a repository or if git hangs.

    The folder is untrusted: git runs no hook, monitor or filter that the repository's configuration names, fetches
    nothing and writes nothing.
    """
    deadline = time.monotonic() + GIT_TIMEOUT_S
    settings = dict(_SAFE_SETTINGS)

    def git(*arguments: str, ends_well: tuple[int, ...] = (0,)) -> str:
        variables = {"GIT_CONFIG_COUNT": str(len(settings))}
        for number, (name, value) in enumerate(settings.items()):
            variables |= {f"GIT_CONFIG_KEY_{number}": name, f"GIT_CONFIG_VALUE_{number}": value}
        done = subprocess.run(
            ["git", "-C", directory, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=max(0.1, deadline - time.monotonic()),
            env=os.environ | _GIT_VARIABLES | variables,
        )
        if done.returncode not in ends_well:
            raise subprocess.SubprocessError
        return done.stdout.decode("utf-8", "replace").strip()

    try:
        commit = git("rev-parse", "HEAD")
        # A changed file may have to pass a filter (a program named in the configuration) to be compared.
        filters = git(
            "config", "--name-only", "--get-regexp", r"^filter\..*\.(clean|process|required)$", ends_well=(0, 1)
        )
        settings |= dict.fromkeys(filters.splitlines(), "")
        changes = git("status", "--porcelain", "--untracked-files=no", "--ignore-submodules=all")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed": bool(changes)}


def describe(directory: str) -> dict[str, Any]:
    """Return the content of `environment.json`."""
    return _at_once() | {"git": git_state(directory), "gpu_links": links_of_gpus()}


def links_of_gpus() -> dict[str, Any] | None:
    """Return how the GPUs of this machine are linked; None for fewer than two, or if the driver does not say."""
    matrix = topology.here()[0] if len(Machine.here().gpus) > 1 else None
    return None if matrix is None else matrix.to_dict()


def _at_once() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "machine": Machine.here().to_dict(),
        "versions": versions(),
        "executable": sys.executable,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "git": None,
        "gpu_links": None,
    }


def record(directory: RunDirectory, cwd: str) -> threading.Thread:
    """Write `environment.json` at once, and return the thread that adds the git state of `cwd` and the links of GPUs.

    The thread need not be joined. Raises OSError if the file cannot be written.
    """
    description = _at_once()
    write_json(directory.environment, description)

    def add(name: str, value: Any) -> None:
        if value is not None:
            description[name] = value
            with contextlib.suppress(OSError):
                write_json(directory.environment, description)

    def add_the_rest() -> None:
        add("git", git_state(cwd))
        add("gpu_links", links_of_gpus())

    thread = threading.Thread(target=add_the_rest, name="labkit-environment", daemon=True)
    thread.start()
    return thread
