"""What really left the interfaces of an emulated network (`launch.network`) during the updates, headers included.

The counters are the kernel's, of the private namespace, in which there is nobody else. Evaluations and checkpoints talk
too: counting pauses meanwhile, and all ranks meet before each reading, so that nothing of an update is still to come
and nothing of the next has left. The first rank of each host reads for all of its host.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from labkit.experiment import Experiment

COUNTERS = Path("/proc/self/net/dev")
"""Not /sys/class/net, which shows the namespace in which it was mounted."""
_SENT = 8
"""The column of sent bytes."""


class Rank(Protocol):
    """What counting needs to know of a rank (training/runtime.py)."""

    @property
    def rank(self) -> int:
        """Number of this rank."""

    @property
    def isolated(self) -> bool:
        """Whether the ranks never exchange anything."""

    def meet(self) -> None:
        """Wait until all ranks have come here."""


def sent() -> dict[str, int]:
    """Bytes that have left each interface of this process's namespace so far."""
    rows = (line.partition(":") for line in COUNTERS.read_text().splitlines()[2:])
    return {name.strip(): int(numbers.split()[_SENT]) for name, _, numbers in rows}


class LinkCounter:
    """Counts between `resume()` and `pause()`; does nothing where there is no emulated network to count in.

    Both are collective where there is one.
    """

    def __init__(self, experiment: Experiment, runtime: Rank) -> None:
        network, ranks = experiment.launch.network, experiment.layout.world_size
        self._runtime = runtime
        self._interface = network.interface if network is not None else ""
        self._counts = network is not None and ranks > 1 and not runtime.isolated
        self._reads = network is not None and runtime.rank % (ranks // network.hosts) == 0
        self._sent: dict[str, int] = {}
        self._seconds = 0.0
        self._at: tuple[float, dict[str, int]] | None = None
        """When counting began, and the counters then; None while it pauses."""

    def resume(self) -> None:
        """From here on it counts."""
        if self._counts:
            self._runtime.meet()
            self._at = time.perf_counter(), sent() if self._reads else {}

    def pause(self) -> None:
        """From here on it does not."""
        if self._at is None:
            return
        self._runtime.meet()
        begun, before = self._at
        self._seconds += time.perf_counter() - begun
        for name, count in sent().items() if self._reads else ():
            self._sent[name] = self._sent.get(name, 0) + count - before.get(name, 0)
        self._at = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no update."""
        counted = self._at is not None
        self.pause()
        yield
        if counted:
            self.resume()

    def found(self) -> dict[str, Any] | None:
        """The fields of the event `link`; None on ranks that do not read.

        interface and its bytes; loopback_bytes, what went through a host's fast loopback beside it; seconds.
        """
        if not self._counts or not self._reads:
            return None
        fast = self._sent.get("lo", 0) if self._interface != "lo" else 0
        return {
            "interface": self._interface,
            "bytes": self._sent.get(self._interface, 0),
            "loopback_bytes": fast,
            "seconds": self._seconds,
        }
