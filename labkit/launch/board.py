"""The heartbeat table: a page of memory that a supervisor shares with its ranks.

Every rank writes its step and phase and when it entered them; the supervisor reads the table to find a stalled rank,
and requests a stop through it.

All ranks stop at the same step without an additional collective: rank 0 reads the request at the beginning of step s
and writes "stop at s + 1" before it contributes to the all-reduce of step s. No rank can begin step s + 1 before that
all-reduce is complete, so every rank reads the mark at the beginning of step s + 1. The same holds in a pipeline:
rank 0 runs the first stage, whose activations reach every later stage within the step.

Ranks that do not synchronise in every step may be ahead of rank 0. With "stop at s + 1 + a" the same holds if no rank
can begin that step before rank 0 has contributed, after step s began, to something that the rank waits for: a = H - 1
where all ranks synchronise after every H-th step, a = d where step s + d waits for what rank 0 sends in step s.

In an asynchronous pipeline of p stages the ranks are at different steps: rank 0 begins minibatch s + p - 1 in step s,
and a rank that has received it reads the mark at the beginning of its next step. A rank waits for minibatch m in a step
that it begins with minibatch m - 2, so with "stop at s + p + 1" no rank waits for minibatch s + p + 1, which is never
sent.
"""

from __future__ import annotations

import mmap
import time
from dataclasses import dataclass

from labkit.experiment.run_directory import PHASES, SLOW_FACTOR, SLOW_PHASES

# Every value is a word of 8 bytes, which is written and read atomically. (struct.pack_into would not do: it fills its
# target with zeros first, and another process may read it at that moment.)
_WORD = 8
_REQUESTED, _STOP_AT, _OPEN, _HEAD = 0, 1, 2, 3  # requested; step to stop at (-1: none); gate is open
_STEP, _PHASE, _PROGRESS, _HEARTBEAT, _MEMORY, _ROW = 0, 1, 2, 3, 4, 5  # the words of one rank


@dataclass(frozen=True)
class RankStatus:
    """The last report of a rank; `progress` and `heartbeat` are the times (monotonic seconds) of the last of each."""

    step: int
    phase: str
    progress: float
    heartbeat: float
    memory_bytes: int


class HeartbeatTable:
    """Shared memory that is created before the fork and inherited by all ranks."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        memory = memoryview(mmap.mmap(-1, _WORD * (_HEAD + world_size * _ROW)))
        self._integers, self._floats = memory.cast("q"), memory.cast("d")
        self._integers[_STOP_AT] = -1
        now = time.monotonic()
        for rank in range(world_size):
            self._floats[self._row(rank) + _PROGRESS] = self._floats[self._row(rank) + _HEARTBEAT] = now

    @staticmethod
    def _row(rank: int) -> int:
        return _HEAD + rank * _ROW

    # -- the rank's side --------------------------------------------------------------------------------------------

    def progress(self, rank: int, step: int, phase: int) -> None:
        """Record that rank `rank` begins phase number `phase` of step `step`."""
        row = _HEAD + rank * _ROW
        self._integers[row + _STEP] = step
        self._integers[row + _PHASE] = phase
        self._floats[row + _PROGRESS] = time.monotonic()

    def heartbeat(self, rank: int, memory_bytes: int) -> None:
        """Record that rank `rank` is alive, whatever its main thread does, and its resident memory."""
        row = self._row(rank)
        self._integers[row + _MEMORY] = memory_bytes
        self._floats[row + _HEARTBEAT] = time.monotonic()

    def should_stop(self, rank: int, step: int, max_step_skew: int = 0) -> bool:
        """Return whether to stop before step `step`; every rank asks at its beginning, and all get the same answer.

        `max_step_skew`: the maximum number of steps by which another rank may be ahead of rank 0 (a above).
        """
        stop_at = self._integers[_STOP_AT]
        if rank == 0 and stop_at < 0 and self._integers[_REQUESTED]:
            # A single rank need not agree with any other.
            stop_at = step if self.world_size == 1 else step + 1 + max_step_skew
            self._integers[_STOP_AT] = stop_at
        return 0 <= stop_at <= step

    @property
    def stops_at(self) -> int | None:
        """The step at which all ranks stop; None until rank 0 has chosen it."""
        stop_at = self._integers[_STOP_AT]
        return None if stop_at < 0 else stop_at

    def stop_requested(self) -> bool:
        """Return whether the supervisor requested a stop; callers must agree among ranks by other means when to end."""
        return bool(self._integers[_REQUESTED])

    def open_gate(self) -> None:
        """Release the ranks that wait while one of them works alone. Called once per run."""
        self._integers[_OPEN] = 1

    @property
    def gate_open(self) -> bool:
        """Whether the rank that works alone has finished."""
        return bool(self._integers[_OPEN])

    # -- the supervisor's side --------------------------------------------------------------------------------------

    def request_stop(self) -> None:
        """Request all ranks to end at a step that they agree on."""
        self._integers[_REQUESTED] = 1

    def rank_status(self, rank: int) -> RankStatus:
        """Return the last report of `rank`."""
        row = self._row(rank)
        integers, floats = self._integers, self._floats
        return RankStatus(
            integers[row + _STEP],
            PHASES[integers[row + _PHASE]],
            floats[row + _PROGRESS],
            floats[row + _HEARTBEAT],
            integers[row + _MEMORY],
        )

    def stalled_ranks(self, limit_s: float, ranks: list[int]) -> list[int]:
        """Return those of the running `ranks` that cause a stall; an empty list if there is no stall.

        Ranks wait for each other, so if one hangs, none makes progress. The cause is a rank without a heartbeat
        (stopped, or blocked in the kernel); otherwise the ranks that are furthest behind: a rank that is ahead only
        waits for them.
        """
        now = time.monotonic()
        statuses = {rank: self.rank_status(rank) for rank in ranks}
        silent = [
            rank for rank, status in statuses.items() if now - status.progress > _timeout_s(status.phase, limit_s)
        ]
        lifeless = [rank for rank in silent if now - statuses[rank].heartbeat > min(5.0, limit_s)]
        if lifeless or not silent:
            return lifeless
        positions = {rank: (status.step, PHASES.index(status.phase)) for rank, status in statuses.items()}
        return [rank for rank in silent if positions[rank] == min(positions.values())]


def _timeout_s(phase: str, limit_s: float) -> float:
    """Return after how many seconds without progress a rank in this phase counts as silent."""
    return SLOW_FACTOR * limit_s if phase in SLOW_PHASES else limit_s
