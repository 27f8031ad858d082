"""The steps of a run as columns, put together from what its ranks report.

Two kinds of runs report steps differently. Where every rank takes a share of each step, a step is complete when all
ranks have reported it. Where ranks take work from a queue (asynchronous update rules), a rank does as many pieces
as it can, each a share of some step, and a step counts as done when that much work is done.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labkit.experiment.events import MAX_STEPS
from labkit.runs.columns import Floats, GrowingArray, as_float32, column, counts

MAX_GAP = 10_000
"""Consecutive steps that may be missing from a file (lost lines) before the following steps are rejected."""
MAX_EVENTS = 100_000
MAX_STALENESS = 4096
"""Staleness is clipped to this value (steps)."""
_SPANS = ("data", "forward", "backward", "optimizer")
_COSTS = ("bytes", "exposed", "compression")


class RankSteps:
    """The steps, or the pieces of work, that one rank has reported."""

    def __init__(self) -> None:
        self.steps = 0
        self.seconds = GrowingArray(np.float32)
        self.compute = GrowingArray(np.float32)
        self.start: dict[str, Any] = {}
        """What the rank reported when it was ready."""
        self.end: str | None = None
        """Why the rank ended: `finished` or `stopped`; None before its end."""

    def write_compute(self, event: dict[str, Any], start: int, drop: int, count: int) -> None:
        """Take in the column `compute` of an event with `count` steps, of which the first `drop` are known already."""
        compute = column(event.get("compute"), count)
        if compute is not None:
            self.compute.write(start, as_float32(compute[drop:]), np.nan)


class Steps:
    """The columns of all steps. Memory: 8 bytes per rank and step, and about 100 bytes per step."""

    def __init__(self) -> None:
        self.first = 0
        """Step from which this run started (above zero when it was resumed)."""
        self.staleness: NDArray[np.int64] = np.zeros(0, np.int64)
        """How many gradients, over all ranks, were 0, 1, 2, … steps old when they were used; empty if not measured."""
        self._ranks: list[RankSteps] = []
        self._first_is_known = False
        self._weighted_loss = GrowingArray(np.float64)
        self._samples = GrowingArray(np.float64)  # a rank may hold a part of each sample
        self._elapsed = GrowingArray(np.float64)
        self._origin: float | None = None
        """When the first step began, on the machine's monotonic clock (s)."""
        self._spans = {name: GrowingArray(np.float32) for name in _SPANS}
        self._costs = {name: GrowingArray(np.float64) for name in _COSTS}
        self._sent = GrowingArray(np.float64)
        self._pauses: list[tuple[float, float]] = []
        """When rank 0 continued after an evaluation or a checkpoint, and how long that had taken (s)."""
        self._grad_norm = GrowingArray(np.float64)  # the parity proof compares it to 1e-9
        self._lr = GrowingArray(np.float32)
        self._from_queue = False
        """Whether ranks take their work from a queue instead of a share of every step."""
        self._piece_ends = GrowingArray(np.float64)
        """When each piece of work was done, in the order of reading."""
        self._order: NDArray[np.int64] = np.zeros(0, np.int64)
        """Indices that sort the pieces by time."""
        self._loss: Floats | None = None

    # -- taking in events -------------------------------------------------------------------------------------------

    def set_first(self, first: int | None) -> None:
        """Set the step that the run started from; only the first event with a valid one counts."""
        if first is not None and not self._first_is_known:
            self.first, self._first_is_known = first, True

    def add_steps(self, rank_number: int, event: dict[str, Any]) -> bool:
        """Take in the checked fields of an event `steps` of a rank; False if its columns cannot be read."""
        first, seconds = event.get("first"), column(event.get("seconds"))
        if first is None or seconds is None or not len(seconds):
            return False
        self._add_staleness(event.get("staleness"))
        if "ticket" in event:
            return self._add_pieces(rank_number, event, seconds)
        self.set_first(first)
        rank, count = self._ranks[rank_number], len(seconds)
        offset = first - self.first
        drop = max(0, rank.steps - offset)  # steps already known are not counted twice
        if drop >= count or offset > rank.steps + MAX_GAP or offset + count > MAX_STEPS:
            return False
        start = offset + drop
        rank.seconds.write(start, as_float32(seconds[drop:]), np.nan)
        rank.write_compute(event, start, drop, count)
        rank.steps = start + count - drop
        loss, samples = column(event.get("loss"), count), column(event.get("samples"), count)
        if loss is not None and samples is not None:
            weighted, weight = _weighted(loss[drop:], samples[drop:])
            self._loss = None
            self._weighted_loss.add(start, weighted)
            self._samples.add(start, weight)
            sent = column(event.get("bytes"), count)
            if sent is not None:
                self._sent.add(start, counts(sent[drop:]))
        if rank_number == 0:
            self._write_spans(start, drop, count, event)
            for name, target in (("grad_norm", self._grad_norm), ("lr", self._lr)):
                values = column(event.get(name), count)
                target.write(start, values[drop:] if values is not None else np.full(count - drop, np.nan), np.nan)
            self._write_elapsed(start, seconds[drop:], event.get("monotonic"))
        return True

    def add_pause(self, rank_number: int, event: dict[str, Any]) -> None:
        """Record the end of an evaluation or a checkpoint and how long it took (s), from its checked fields."""
        now, took = event.get("monotonic"), event.get("seconds")
        if rank_number == 0 and now is not None and took is not None and len(self._pauses) < MAX_EVENTS:
            self._pauses.append((now, took))

    @property
    def began(self) -> float | None:
        """When the first step began, on the machine's monotonic clock (s); None before the first steps are read."""
        return self._origin

    def seconds_since_start(self, monotonic: float | None) -> float:
        """Return how long after the first step began a moment of the machine's monotonic clock was (s)."""
        return 0.0 if monotonic is None or self._origin is None else min(max(0.0, monotonic - self._origin), 1e10)

    def _add_pieces(self, rank_number: int, event: dict[str, Any], seconds: Floats) -> bool:
        """Take in pieces of work from a queue: each is a share of some step."""
        count, world_size = len(seconds), len(self._ranks)
        ticket, ended, loss, samples = (
            column(event.get(name), count) for name in ("ticket", "ended", "loss", "samples")
        )
        if ticket is None or ended is None or loss is None or samples is None:
            return False
        limit = MAX_STEPS * world_size
        if not (np.isfinite(ended).all() and (ticket >= 0).all() and (ticket < limit).all()):
            return False
        if self._piece_ends.length + count > limit:
            return False
        rank, step = self._ranks[rank_number], ticket.astype(np.int64) // world_size - self.first
        if step.min() < 0 or step.max() > self._piece_ends.length // world_size + MAX_GAP:
            return False
        self._from_queue, self._loss = True, None
        self._write_spans(self._piece_ends.length, 0, count, event)
        rank.seconds.write(rank.steps, as_float32(seconds), np.nan)
        rank.write_compute(event, rank.steps, 0, count)
        rank.steps += count
        self._piece_ends.write(self._piece_ends.length, ended, 0.0)
        weighted, weight = _weighted(loss, samples)
        self._weighted_loss.add_at(step, weighted)
        self._samples.add_at(step, weight)
        sent = column(event.get("bytes"), count)
        if sent is not None:
            self._sent.add_at(step, counts(sent))
        if self._origin is None or float(ended[0] - seconds[0]) < self._origin:
            self._origin = float(ended[0] - np.nan_to_num(seconds[0]))
        return True

    def _write_spans(self, start: int, drop: int, count: int, event: dict[str, Any]) -> None:
        """Take in where the time of rank 0's steps went; of work from a queue, that of every rank's pieces."""
        for name, target in (self._spans | self._costs).items():
            values = column(event.get(name), count)
            present = values[drop:] if values is not None else np.full(count - drop, np.nan)
            target.write(start, as_float32(present) if name in self._spans else present, np.nan)

    def _add_staleness(self, values: Any) -> None:
        ages = column(values)
        if ages is None or not len(ages):
            return
        clipped = np.clip(ages[np.isfinite(ages)], 0, MAX_STALENESS).astype(np.int64)
        histogram = np.bincount(clipped, minlength=len(self.staleness))
        histogram[: len(self.staleness)] += self.staleness
        self.staleness = histogram

    def _write_elapsed(self, start: int, seconds: Floats, end: float | None) -> None:
        """Compute when these steps ended from the time at which the last step of the event ended."""
        seconds = np.nan_to_num(np.clip(seconds, 0, 1e9), nan=0.0)
        before = float(self._elapsed.values[-1]) if self._elapsed.length else 0.0
        along = np.cumsum(seconds)
        if end is not None and self._origin is None:
            self._origin = end - float(along[-1]) - before
        last = before + float(along[-1]) if end is None or self._origin is None else end - self._origin
        times = last - float(along[-1]) + along
        if not math.isfinite(last) or last < before or last > 1e10:
            times = before + along
        self._elapsed.write(start, np.maximum.accumulate(np.maximum(times, before)), before)

    def _by_time(self, pieces: NDArray[Any]) -> NDArray[Any]:
        """Return figures of pieces, which are stored in the order of reading, in the order of time."""
        if len(self._order) != self._piece_ends.length:
            self._order = np.argsort(self._piece_ends.values, kind="stable")
        return pieces[self._order]

    # -- reading the columns ----------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether the run has ended, so that nothing more will come."""
        return False

    @property
    def uses_work_queue(self) -> bool:
        """Whether ranks take their work from a queue (asynchronous updates) instead of a share of each step."""
        return self._from_queue

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self._ranks)

    @property
    def rank_steps(self) -> list[int]:
        """Steps reported by each rank (counted from `first`)."""
        return [rank.steps for rank in self._ranks]

    @property
    def rank_starts(self) -> list[dict[str, Any]]:
        """What each rank reported when it was ready: device, pid, threads, parameters, steps,
        time_to_first_step_seconds (None until known) and effective; {} before that.
        """
        return [rank.start for rank in self._ranks]

    @property
    def steps(self) -> int:
        """Number of complete steps; of work from a queue, as many as the work adds up to."""
        if self._from_queue:
            return min(self._piece_ends.length // max(1, len(self._ranks)), self._samples.length)
        counted = [rank.steps for rank in self._ranks if rank.steps or not self.done]
        return min(min(counted, default=0), self._samples.length)

    @property
    def step(self) -> NDArray[np.int64]:
        """Number of steps done after each complete step (first + 1, first + 2, …), int64 (steps,)."""
        return np.arange(self.first + 1, self.first + self.steps + 1, dtype=np.int64)

    @property
    def loss(self) -> Floats:
        """Mean loss of each step over all samples (steps,); inf where it was not a finite number, never NaN.

        A step that no file holds any more (a lost line) repeats the one before it.
        """
        count = self.steps
        if self._loss is not None and len(self._loss) == count:
            return self._loss
        samples = self._samples.values[:count]
        loss = self._weighted_loss.values[:count] / np.where(samples > 0, samples, 1)
        present = samples > 0
        if not present.all() and present.any():
            source = np.maximum.accumulate(np.where(present, np.arange(count), -1))
            source[source < 0] = int(np.argmax(present))
            loss = loss[source]
        loss.flags.writeable = False
        self._loss = loss
        return loss

    @property
    def samples(self) -> NDArray[np.int64]:
        """Samples of each step over all ranks (steps,)."""
        rounded = np.rint(self._samples.values[: self.steps]).astype(np.int64)
        rounded.flags.writeable = False
        return rounded

    @property
    def elapsed(self) -> Floats:
        """Seconds from the start of the first step to the end of each step, never falling (steps,)."""
        count = self.steps
        if self._from_queue:  # step t is done when as much work is done as t steps have
            world_size = len(self._ranks)
            ends = self._by_time(self._piece_ends.values)[world_size - 1 : count * world_size : world_size] - (
                self._origin or 0.0
            )
            return np.maximum.accumulate(np.clip(ends, 0.0, 1e10))
        if self._elapsed.length >= count:
            return self._elapsed.values[:count]
        present = next((rank for rank in self._ranks if rank.steps >= count), None)  # rank 0's file is lost
        seconds = present.seconds.values[:count] if present else np.zeros(count, np.float32)
        return np.cumsum(np.nan_to_num(np.clip(seconds, 0, 1e9), nan=0.0), dtype=np.float64)

    @property
    def training_seconds(self) -> Floats:
        """Seconds of training up to the end of each step, without evaluations and checkpoints (steps,)."""
        count = self.steps
        if self._from_queue:
            world_size, origin = len(self._ranks), self._origin or 0.0
            ends = self._by_time(self._piece_ends.values)[world_size - 1 : count * world_size : world_size]
            pauses = sorted(pause for pause in self._pauses if pause[0] >= origin)
            before = np.searchsorted([end for end, _ in pauses], ends, side="right")
            paused = np.concatenate([[0.0], np.cumsum([took for _, took in pauses])])[before]
            return np.maximum.accumulate(np.clip(ends - origin - paused, 0.0, 1e10))
        present = [rank.seconds.values[:count] for rank in self._ranks if rank.steps >= count]
        clean = [np.nan_to_num(np.clip(seconds, 0, 1e9), nan=0.0).astype(np.float64) for seconds in present]
        # A step is done when the last rank has done it; ranks of a local method run ahead of each other.
        return np.max([np.cumsum(seconds) for seconds in clean], axis=0) if clean else np.zeros(count)

    @property
    def seconds(self) -> list[NDArray[np.float32]]:
        """Duration of each step per rank (s); NaN where lost. Of work from a queue, that of all ranks together."""
        if self._from_queue:
            step_seconds = np.diff(self.training_seconds, prepend=0.0).astype(np.float32)
            return [step_seconds] * len(self._ranks)
        return [rank.seconds.values for rank in self._ranks]

    @property
    def compute(self) -> list[NDArray[np.float32]]:
        """Seconds of each step, or piece of work, in which each rank computed, without waiting; NaN where unknown."""
        return [rank.compute.values for rank in self._ranks]

    @property
    def spans(self) -> dict[str, NDArray[np.float32]]:
        """Rank 0's data, forward, backward and optimizer time of each step (s); NaN where unknown.

        Of work from a queue: those of every piece of all ranks, in the order of time.
        """
        if self._from_queue:
            return {name: self._by_time(span.values) for name, span in self._spans.items()}
        return {name: span.values for name, span in self._spans.items()}

    @property
    def grad_norm(self) -> Floats:
        """Global gradient norm of each step (steps,); NaN where it was not reported."""
        return self._padded(self._grad_norm)

    @property
    def lr(self) -> Floats:
        """Learning rate of each step (steps,); NaN where it was not reported."""
        return self._padded(self._lr)

    @property
    def exchanged(self) -> dict[str, Floats]:
        """What combining gradients cost rank 0 in each step (steps,); NaN where it was not reported.

        bytes: sent by it; exposed: seconds in which nothing was computed meanwhile; compression: seconds. Of work
        from a queue: those of every piece of all ranks, in the order of time.
        """
        if self._from_queue:
            return {name: self._by_time(values.values) for name, values in self._costs.items()}
        return {name: self._padded(values) for name, values in self._costs.items()}

    @property
    def sent(self) -> Floats:
        """Bytes that all ranks together sent in each step to combine gradients or weights (steps,); NaN if uncounted.

        One rank sends nothing.
        """
        return np.zeros(self.steps) if len(self._ranks) == 1 else self._padded(self._sent)

    def _padded(self, values: GrowingArray) -> Floats:
        count = self.steps
        present = values.values[:count].astype(np.float64)
        return np.concatenate([present, np.full(count - len(present), np.nan)])


def _weighted(loss: Floats, samples: Floats) -> tuple[Floats, Floats]:
    """Return loss × samples (inf where the loss is not finite) and the samples as weights."""
    weight = np.nan_to_num(np.clip(samples, 0, 1e12), nan=0.0, posinf=0.0, neginf=0.0)
    with np.errstate(all="ignore"):
        weighted = np.where(weight > 0, loss * weight, 0.0)
    return np.where(np.isfinite(weighted), weighted, np.inf), weight
