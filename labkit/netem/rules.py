"""The slow link between ranks: whether this machine can make it, and what it goes together with.

What it is made of stands in `labkit/netem/hosts.py`. That side is asked as a program, because trying changes the
process that tries, and a kernel must stay as it is.
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
    """Why a part of the emulated network cannot be had on this machine; "" for what can."""

    bucket: str = ""
    """A private network with a slow link."""
    delay: str = ""
    hosts: str = ""
    """More than one host, each with a network of its own."""


@lru_cache(maxsize=1)
def possible() -> Links:
    """Try it, once per process (about 50 ms)."""
    if sys.platform != "linux":
        return Links(*3 * ["private network namespaces are Linux's"])
    command = [sys.executable, "-I", "-S", str(PROGRAM)]
    try:
        answer = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=True
        )
        found = json.loads(answer.stdout)
        return Links(**{name: str(found[name]) for name in ("bucket", "delay", "hosts")})
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError) as error:
        return Links(*3 * [f"trying it failed ({type(error).__name__})"])


def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
    """Why `launch.network` cannot be had in this experiment or on this machine."""
    launch, ranks = experiment.launch, experiment.layout.world_size
    network = launch.network
    if network is None:
        return
    if launch.device == "cuda" and ranks <= len(machine.gpus):
        yield Problem("launch.network", "NCCL between GPUs does not go through the network that is slowed down", "null")
        return
    if possible().bucket:
        yield Problem("launch.network", f"the link cannot be slowed down here: {possible().bucket}", "null")
        return
    if launch.transport == "shared_memory":
        yield Problem("launch.transport", "memory that ranks share is no network and would not be slow", "auto")
    if network.delay_ms and possible().delay:
        yield Problem("launch.network.delay_ms", possible().delay, 0)
    if network.hosts > 1 and possible().hosts:
        yield Problem("launch.network.hosts", possible().hosts, 1)
    elif ranks % network.hosts:
        fitting = max(hosts for hosts in range(1, network.hosts) if ranks % hosts == 0)
        yield Problem(
            "launch.network.hosts", f"{ranks} ranks cannot be dealt out evenly to {network.hosts} hosts", fitting
        )


def warnings(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
    """What the slow link is, so that nobody takes it for a real one; or that it does nothing."""
    launch, ranks = experiment.launch, experiment.layout.world_size
    network = launch.network
    if network is None:
        return
    if ranks == 1 or launch.isolated:
        why = "one rank talks to nobody" if ranks == 1 else "independent copies never talk"
        yield Problem("launch.network", f"has no effect: {why}")
        return
    rate = f"{network.rate_mbit:g} Mbit/s" + (f" with {network.delay_ms:g} ms of delay" if network.delay_ms else "")
    if network.hosts == 1:
        said = f"one link of {rate}, shared by all ranks and both directions"
    else:
        said = f"{network.hosts} hosts, each joined to a switch by a link of {rate} in each direction"
    yield Problem("launch.network", f"emulated on this machine: {said}")
