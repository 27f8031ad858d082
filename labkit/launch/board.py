"""The board: a page of memory shared by a supervisor and its ranks.

Every rank writes where it is (step, phase, when); the supervisor reads it to find a silent rank, and asks for a stop.

How all ranks stop at the same step without a collective of their own: rank 0 looks at the request at the beginning of
step s and writes "stop at s + 1" before it contributes to the all-reduce of step s. No rank can begin step s + 1 before
that all-reduce is done, so each of them sees the mark when it looks at the beginning of step s + 1. The same holds in
a pipeline: rank 0 holds its first stage, whose activations reach every later stage within the step.

Ranks that do not wait for each other in every step may be ahead of rank 0. With "stop at s + 1 + a" the same holds if
no rank can begin that step before rank 0 has taken part, after step s began, in something that it waits for: a = H - 1
where all meet after every H-th step, a = d where step s + d waits for what rank 0 sends in step s.

In an asynchronous pipeline of p stages ranks are apart: rank 0 begins minibatch s + p - 1 in step s, and who has got it
sees the mark at the beginning of its next step. A rank waits for minibatch m in a step that it begins with m - 2, so
with "stop at s + p + 1" nobody waits for minibatch s + p + 1, of which there is none.
"""

from __future__ import annotations

import mmap
import time
from dataclasses import dataclass

from labkit.experiment.run_directory import PHASES, SLOW_FACTOR, SLOW_PHASES

# Everything is a word of 8 bytes, written and read in one piece. (struct.pack_into would not do: it fills its target
# with zeros first, and another process may look just then.)
_WORD = 8
_REQUESTED, _STOP_AT, _OPEN, _HEAD = 0, 1, 2, 3  # stop requested; stop at this step (-1: no); the gate is open
_STEP, _PHASE, _PROGRESS, _LIFE, _MEMORY, _ROW = 0, 1, 2, 3, 4, 5  # where and when


@dataclass(frozen=True)
class RankStatus:
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
        memory = memoryview(mmap.mmap(-1, _WORD * (_HEAD + world_size * _ROW)))
        self._whole, self._real = memory.cast("q"), memory.cast("d")
        self._whole[_STOP_AT] = -1
        now = time.monotonic()
        for rank in range(world_size):
            self._real[self._row(rank) + _PROGRESS] = self._real[self._row(rank) + _LIFE] = now

    @staticmethod
    def _row(rank: int) -> int:
        return _HEAD + rank * _ROW

    # -- the rank's side --------------------------------------------------------------------------------------------

    def progress(self, rank: int, step: int, phase: int) -> None:
        """Rank `rank` begins phase number `phase` of step `step`."""
        row = _HEAD + rank * _ROW
        self._whole[row + _STEP] = step
        self._whole[row + _PHASE] = phase
        self._real[row + _PROGRESS] = time.monotonic()

    def life(self, rank: int, memory_bytes: int) -> None:
        """Rank `rank` is alive, whatever its main thread does."""
        row = self._row(rank)
        self._whole[row + _MEMORY] = memory_bytes
        self._real[row + _LIFE] = time.monotonic()

    def should_stop(self, rank: int, step: int, apart: int = 0) -> bool:
        """Called by every rank at the beginning of step `step`; the same answer on all ranks.

        `apart`: by how many steps another rank may be ahead of rank 0 (a above).
        """
        stop_at = self._whole[_STOP_AT]
        if rank == 0 and stop_at < 0 and self._whole[_REQUESTED]:
            # A rank that is alone has nobody to agree with.
            stop_at = step if self.world_size == 1 else step + 1 + apart
            self._whole[_STOP_AT] = stop_at
        return 0 <= stop_at <= step

    @property
    def stops_at(self) -> int | None:
        """The step at which all will stop, once that is known."""
        stop_at = self._whole[_STOP_AT]
        return None if stop_at < 0 else stop_at

    def asked_to_stop(self) -> bool:
        """Has the supervisor asked? Ranks that see it must agree in a way of their own when to end."""
        return bool(self._whole[_REQUESTED])

    def open_gate(self) -> None:
        """Let the other ranks go on, which wait at the gate while one of them works alone. Once in a run."""
        self._whole[_OPEN] = 1

    @property
    def gate_open(self) -> bool:
        """Has the rank that works alone come to its end?"""
        return bool(self._whole[_OPEN])

    # -- the supervisor's side --------------------------------------------------------------------------------------

    def request_stop(self) -> None:
        """Ask all ranks to end after a step that they agree on."""
        self._whole[_REQUESTED] = 1

    def place(self, rank: int) -> RankStatus:
        """Where `rank` is."""
        row = self._row(rank)
        whole, real = self._whole, self._real
        return RankStatus(
            whole[row + _STEP],
            PHASES[whole[row + _PHASE]],
            real[row + _PROGRESS],
            real[row + _LIFE],
            whole[row + _MEMORY],
        )

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
    """Return after how many seconds a rank in this phase counts as silent."""
    return SLOW_FACTOR * limit_s if phase in SLOW_PHASES else limit_s
