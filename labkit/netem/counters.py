"""The bytes that left the interfaces of an emulated network (`launch.network`) during the updates, headers included.

The counters are the kernel's, of the private namespace, which no other process uses. Evaluations and checkpoints
communicate too: counting pauses meanwhile, and all ranks synchronise before each reading, so that all messages of an
update have been sent and none of the next. The first rank of each host reads the counters for its whole host.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from labkit.experiment import Experiment

COUNTERS = Path("/proc/self/net/dev")
"""Interface counters. /sys/class/net would show those of the namespace in which it was mounted."""
_SENT = 8
"""Index of the column of sent bytes."""


class Rank(Protocol):
    """What a `LinkCounter` needs of a rank (training/runtime.py)."""

    @property
    def rank(self) -> int:
        """Number of this rank."""

    @property
    def isolated(self) -> bool:
        """True if the ranks never communicate."""

    def meet(self) -> None:
        """Wait until all ranks have reached this call."""


def bytes_sent() -> dict[str, int]:
    """Return the bytes that have left each interface of this process's namespace so far."""
    rows = (line.partition(":") for line in COUNTERS.read_text().splitlines()[2:])
    return {name.strip(): int(numbers.split()[_SENT]) for name, _, numbers in rows}


class LinkCounter:
    """Counts sent bytes between the collective `resume()` and `pause()`; does nothing without an emulated network."""

    def __init__(self, experiment: Experiment, runtime: Rank) -> None:
        network, ranks = experiment.launch.network, experiment.layout.world_size
        self._runtime = runtime
        self._interface = network.interface if network is not None else ""
        self._counts = network is not None and ranks > 1 and not runtime.isolated
        self._reads = network is not None and runtime.rank % (ranks // network.hosts) == 0
        self._sent: dict[str, int] = {}
        self._seconds = 0.0
        self._start: tuple[float, dict[str, int]] | None = None
        """When counting began, and the counters then; None while it is paused."""

    def resume(self) -> None:
        """Count from now on."""
        if self._counts:
            self._runtime.meet()
            self._start = time.perf_counter(), bytes_sent() if self._reads else {}

    def pause(self) -> None:
        """Stop counting, and add up what has been sent since `resume()`."""
        if self._start is None:
            return
        self._runtime.meet()
        begun, before = self._start
        self._seconds += time.perf_counter() - begun
        for name, count in bytes_sent().items() if self._reads else ():
            self._sent[name] = self._sent.get(name, 0) + count - before.get(name, 0)
        self._start = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Context manager that pauses counting, for everything that does not belong to an update."""
        was_counting = self._start is not None
        self.pause()
        yield
        if was_counting:
            self.resume()

    def totals(self) -> dict[str, Any] | None:
        """Return the fields of the event `link`; None on ranks that do not read the counters.

        `interface` and its `bytes`; `loopback_bytes`, sent through the host's fast loopback instead; `seconds`.
        """
        if not self._counts or not self._reads:
            return None
        loopback = self._sent.get("lo", 0) if self._interface != "lo" else 0
        return {
            "interface": self._interface,
            "bytes": self._sent.get(self._interface, 0),
            "loopback_bytes": loopback,
            "seconds": self._seconds,
        }
