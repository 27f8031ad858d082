"""The board: a page of memory shared by a supervisor and its ranks.

Every rank writes where it is (step, phase, when); the supervisor reads it to find a silent rank, and asks for a stop.

How all ranks stop at the same step without a collective of their own: rank 0 looks at the request at the beginning of
step s and writes "stop at s + 1" before it contributes to the all-reduce of step s. No rank can begin step s + 1 before
that all-reduce is done, so each of them sees the mark when it looks at the beginning of step s + 1.
"""

from __future__ import annotations

import mmap
import struct
import time
from dataclasses import dataclass

from labkit.experiment.run_directory import PHASES

_HEAD = struct.Struct("qq")  # stop requested, stop at this step (-1: no)
_ROW = struct.Struct("qqddq")  # step, phase, time of last progress, time of last sign of life, memory in bytes
_WORD = struct.Struct("q")


@dataclass(frozen=True)
class Place:
    """Where a rank is; times are monotonic seconds."""

    step: int
    phase: str
    progress: float
    life: float
    memory_bytes: int


class Board:
    """Shared memory, made before the fork and inherited by all ranks."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._memory = mmap.mmap(-1, _HEAD.size + world_size * _ROW.size)
        _HEAD.pack_into(self._memory, 0, 0, -1)
        now = time.monotonic()
        for rank in range(world_size):
            _ROW.pack_into(self._memory, self._row(rank), 0, 0, now, now, 0)

    def _row(self, rank: int) -> int:
        return _HEAD.size + rank * _ROW.size

    # -- the rank's side --------------------------------------------------------------------------------------------

    def progress(self, rank: int, step: int, phase: int) -> None:
        """Rank `rank` begins phase number `phase` of step `step`."""
        struct.pack_into("qqd", self._memory, self._row(rank), step, phase, time.monotonic())

    def life(self, rank: int, memory_bytes: int) -> None:
        """Rank `rank` is alive, whatever its main thread does."""
        struct.pack_into("dq", self._memory, self._row(rank) + 24, time.monotonic(), memory_bytes)

    def should_stop(self, rank: int, step: int) -> bool:
        """Called by every rank at the beginning of step `step`; the same answer on all ranks."""
        requested, stop_at = _HEAD.unpack_from(self._memory, 0)
        if rank == 0 and requested and stop_at < 0:
            # A rank that is alone has nobody to agree with.
            stop_at = step if self.world_size == 1 else step + 1
            _WORD.pack_into(self._memory, 8, stop_at)
        return 0 <= stop_at <= step

    # -- the supervisor's side --------------------------------------------------------------------------------------

    def request_stop(self) -> None:
        _WORD.pack_into(self._memory, 0, 1)

    def place(self, rank: int) -> Place:
        step, phase, progress, life, memory = _ROW.unpack_from(self._memory, self._row(rank))
        return Place(step, PHASES[phase], progress, life, memory)

    def silent(self, limit_s: float, ranks: list[int]) -> list[int]:
        """Of the running `ranks`, those to blame for a standstill; [] while there is none.

        Ranks wait for each other, so one that hangs makes all fall silent. To blame is a rank without any sign of
        life (stopped, or stuck in the kernel); else the silent ones that are furthest behind: a rank that is ahead only
        waits.
        """
        now = time.monotonic()
        places = {rank: self.place(rank) for rank in ranks}
        silent = [rank for rank, place in places.items() if now - place.progress > _patience(place.phase, limit_s)]
        lifeless = [rank for rank in silent if now - places[rank].life > min(5.0, limit_s)]
        if lifeless or not silent:
            return lifeless
        reached = {rank: (place.step, PHASES.index(place.phase)) for rank, place in places.items()}
        return [rank for rank in silent if reached[rank] == min(reached.values())]


def _patience(phase: str, limit_s: float) -> float:
    """The set-up reads data and may compile: it gets ten times as long."""
    return 10 * limit_s if phase == "setup" else limit_s
