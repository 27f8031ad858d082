"""The slow link between ranks: whether this machine can emulate it, and with which settings it can be combined.

`labkit/netem/hosts.py` makes the link. Whether that is possible is tried in a program of its own, because trying moves
the process into another namespace, and a notebook's kernel must stay where it is.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from labkit.experiment import Experiment, Machine, Problem

PROGRAM = Path(__file__).with_name("namespace.py")


@dataclass(frozen=True)
class Links:
    """Why each part of the emulated network is impossible on this machine; "" if it is possible."""

    bucket: str = ""
    """Why a private network with a slow link is impossible."""
    delay: str = ""
    """Why a delay is impossible."""
    hosts: str = ""
    """Why more than one host, each with a network of its own, is impossible."""


@lru_cache(maxsize=1)
def possible() -> Links:
    """Try what this machine can emulate, once per process (about 50 ms), and return what is impossible and why."""
    if sys.platform != "linux":
        return Links(*3 * ["private network namespaces exist only on Linux"])
    command = [sys.executable, "-I", "-S", str(PROGRAM)]
    try:
        answer = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=True
        )
        answers = json.loads(answer.stdout)
        return Links(**{name: str(answers[name]) for name in ("bucket", "delay", "hosts")})
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError) as error:
        return Links(*3 * [f"trying it failed ({type(error).__name__})"])


def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
    """Yield the reasons why `launch.network` is impossible in this experiment or on this machine."""
    launch, ranks = experiment.launch, experiment.layout.world_size
    network = launch.network
    if network is None:
        return
    if launch.device == "cuda" and ranks <= len(machine.gpus):
        yield Problem("launch.network", "NCCL between GPUs does not use the network that is slowed down", "null")
        return
    if possible().bucket:
        yield Problem("launch.network", f"the link cannot be slowed down here: {possible().bucket}", "null")
        return
    if launch.transport == "shared_memory":
        yield Problem("launch.transport", "shared memory is not a network and would not be slowed down", "auto")
    if network.delay_ms and possible().delay:
        yield Problem("launch.network.delay_ms", possible().delay, 0)
    if network.hosts > 1 and possible().hosts:
        yield Problem("launch.network.hosts", possible().hosts, 1)
    elif ranks % network.hosts:
        fitting = max(hosts for hosts in range(1, network.hosts) if ranks % hosts == 0)
        yield Problem(
            "launch.network.hosts", f"{ranks} ranks cannot be distributed evenly over {network.hosts} hosts", fitting
        )


def warnings(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
    """Yield what the emulated link is, so that nobody takes it for a real one; or that it has no effect."""
    launch, ranks = experiment.launch, experiment.layout.world_size
    network = launch.network
    if network is None:
        return
    if ranks == 1 or launch.isolated:
        why = "a single rank does not communicate" if ranks == 1 else "independent copies do not communicate"
        yield Problem("launch.network", f"has no effect: {why}")
        return
    rate = f"{network.rate_mbit:g} Mbit/s" + (f" with {network.delay_ms:g} ms of delay" if network.delay_ms else "")
    if network.hosts == 1:
        description = f"one link of {rate}, shared by all ranks and both directions"
    else:
        description = f"{network.hosts} hosts, each joined to a switch by a link of {rate} in each direction"
    yield Problem("launch.network", f"emulated on this machine: {description}")
