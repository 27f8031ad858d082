"""The numbers of a run, read from its directory as they grow.

The directory is untrusted: it may come from another machine, be half written, or be made to harm. Nothing in a file is
taken as code, as a path or as a size; a line that cannot be read is counted in `skipped_lines` and left out.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labkit.experiment import safe_files
from labkit.experiment.after_training import FORMS
from labkit.experiment.memory import KINDS
from labkit.experiment.run_directory import TERMINAL, RunDirectory, read_json
from labkit.runs import kernels, numbers
from labkit.runs.checked import figure as _figure
from labkit.runs.checked import integer as _integer
from labkit.runs.checked import number as _number
from labkit.runs.pipeline import Action

Floats = NDArray[np.float64]

MAX_RANKS = 4096
MAX_STEPS = 10_000_000
MAX_GAP = 10_000
"""Most consecutive steps that may be missing from a file (lost lines) before what follows is not believed."""
MAX_EVENTS = 100_000
MAX_LINE_BYTES = 4 * 2**20
MAX_UNREADABLE_BYTES = 64 * 2**20
"""A file in which so much is no event of ours is not read any further."""
MAX_ACTIONS = 200_000
"""Most actions of all timelines together that are kept."""
MAX_AXES, MAX_BLOCKS, MAX_EXPERTS = 64, 1024, 1024
MAX_LAYERS = 64
"""Most layers of a rank whose numbers are kept, and a sixteenth of the most of all ranks."""
MAX_STALENESS = 4096
"""What is staler counts as so stale."""
_CHUNK_BYTES = 128 * 2**10
_SPANS = ("data", "forward", "backward", "optimizer")
_EXCHANGED = ("bytes", "exposed", "compression")
_EXCHANGES = (
    "bytes_per_step",
    "exposed_seconds_per_step",
    "counted_bytes_per_step",
    "formula_bytes_per_step",
    "compression_seconds",
)
BESIDE = ("float", "quantized")
MAX_EFFECTIVE, MAX_SIZES = 50, 16
TRAFFIC = ("calls", "bytes", "wire_bytes", "exposed_seconds")
LINK = ("bytes", "loopback_bytes", "seconds", "updates")
_AXIS = re.compile(r"[a-z_]{1,20}(\+[a-z_]{1,20}){0,7}")
_FILE = re.compile(r"rank-(0|[1-9][0-9]{0,3})\.jsonl")


class GrowingArray:
    """A one-dimensional array that doubles its room as it grows."""

    def __init__(self, dtype: Any) -> None:
        self._room: NDArray[Any] = np.zeros(256, dtype)
        self.length = 0

    def extend_to(self, length: int, fill: float) -> None:
        """Grow to `length`; new places hold `fill`."""
        if length > len(self._room):
            room = np.empty(max(length, min(2 * len(self._room), MAX_STEPS)), self._room.dtype)
            room[: self.length] = self._room[: self.length]
            self._room = room
        if length > self.length:
            self._room[self.length : length] = fill
            self.length = length

    def write(self, first: int, values: NDArray[Any], fill: float) -> None:
        """Put `values` at `first`; places skipped on the way hold `fill`."""
        self.extend_to(first + len(values), fill)
        self._room[first : first + len(values)] = values

    def add(self, first: int, values: NDArray[Any]) -> None:
        """Add `values` to what stands from `first` on (zero where nothing stood)."""
        self.extend_to(first + len(values), 0)
        self._room[first : first + len(values)] += values

    def add_at(self, places: NDArray[np.int64], values: NDArray[Any]) -> None:
        """Add each value at its place, which may come twice (zero where nothing stood)."""
        self.extend_to(int(places.max()) + 1, 0)
        np.add.at(self._room, places, values)

    @property
    def values(self) -> NDArray[Any]:
        """A read-only view of what has been written."""
        view = self._room[: self.length]
        view.flags.writeable = False
        return view


class _Rank:
    """What is known of one rank, and how far its file has been read."""

    def __init__(self) -> None:
        self.offset = 0
        self.in_long_line = False
        self.unreadable_bytes = 0
        self.read_all = False
        self.steps = 0
        self.seconds = GrowingArray(np.float32)
        self.compute = GrowingArray(np.float32)
        self.start: dict[str, Any] = {}
        self.end: str | None = None

    def note_compute(self, event: dict[str, Any], at: int, drop: int, count: int) -> None:
        """The column `compute` of an event with `count` steps, of which the first `drop` are known already."""
        compute = _column(event.get("compute"), count)
        if compute is not None:
            self.compute.write(at, _narrow(compute[drop:]), np.nan)


class RunData:
    """The events of a run as arrays. `refresh()` reads what is new; nothing else touches the disk.

    A step counts (`steps`) when every rank has reported it; a run that has ended counts every step that all ranks
    with any step have reported. Memory is bounded by 8 bytes a rank and step, about 100 bytes a
    step (of drawn work about 60 bytes a piece), and one trace a rank.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory
        self.status: dict[str, Any] = {}
        """status.json as it stands, or {}; untrusted."""
        self.progress: dict[str, Any] = {}
        """progress.json as it stands, or {}; untrusted."""
        self.summary: dict[str, Any] | None = None
        """summary.json once it is there; untrusted."""
        self.facts: dict[str, Any] = {}
        """What rank 0 told of the task: classes, majority share, …; untrusted."""
        self.metric: dict[str, Any] = {}
        """key, title, higher_is_better and unit of the metric by which people judge the workload."""
        self.first = 0
        """Step from which this run started (above zero when it was resumed)."""
        self.evaluations: list[tuple[int, float, dict[str, float]]] = []
        """(updates done, seconds since the first step began, metrics), in the order of the file.

        A metric that is no finite number is NaN.
        """
        self.communication: dict[str, float] | None = None
        """As last reported, the largest over the ranks: bytes_per_step, exposed_seconds_per_step; of combining
        gradients counted_bytes_per_step, formula_bytes_per_step and compression_seconds, per update too.
        """
        self.counted: dict[int, float] = {}
        """By rank, bytes sent for combining gradients or weights, per update."""
        self.compressor = ""
        """The compressor that was at work, by its name."""
        self.traced: int | None = None
        """The update, counted from 1, that the next five come from; None before it."""
        self.memory: dict[int, dict[str, int]] = {}
        """By rank, bytes of parameters, gradients, optimizer and activations."""
        self.formula: dict[int, dict[str, int]] = {}
        """By rank, bytes of parameters, gradients and optimizer as the formula of the layout has them."""
        self.traffic: dict[int, dict[str, dict[str, float]]] = {}
        """By rank and axis (or product of axes): calls, bytes, wire_bytes, exposed_seconds of one update."""
        self.timeline: dict[int, list[Action]] = {}
        """By rank, what it computed in its pipeline, in order."""
        self.experts: dict[str, NDArray[np.int64]] = {}
        """By block, how many choices fell on each of its experts, over all ranks that see different tokens."""
        self.staleness: NDArray[np.int64] = np.zeros(0, np.int64)
        """How many gradients, of all ranks, were 0, 1, 2, … updates old when they were used; empty if not measured."""
        self.sparsity: list[tuple[int, dict[str, tuple[int, int, float]]]] = []
        """(updates done, by weight: zeros as counted, weights, and what part of those kept came new), one entry for
        every change of what is zero.
        """
        self.links: dict[int, dict[str, float]] = {}
        """By rank that read its host's counters: bytes, loopback_bytes, seconds and updates (netem/counters.py)."""
        self.quantized: dict[str, Any] = {}
        """The network after training beside its quantized copy (training/after/quantized.py): method, qat, layers,
        samples, seconds, metrics, bytes, layer_bytes, latency_seconds (by batch size) and sensitivity [(layer, change
        of the loss)]; each of the middle four by "float" and "quantized". Empty if nothing was quantized.
        """
        self.numbers: list[numbers.Layer] = []
        """What numbers are multiplied in layers with a product, those of all stages in the order of the network, as the
        last evaluation saw them; of a large network some layers, evenly chosen.
        """
        self.multiplied: dict[str, int] = {}
        """In how many layers of the whole network what is multiplied: `{"int8 × ternary": 24}`."""
        self.kernels: list[kernels.Kind] = []
        """Each kind of layer of the first rank beside a dense one in float32, the most expensive first; empty for runs
        that are dense and full.
        """
        self.without_kernel = 0
        """Layers of the first rank that were not measured."""
        self.exported: dict[str, Any] = {}
        """The sparse network after training in several forms (training/after/exported.py): samples, seconds, saved,
        file_bytes; metrics, bytes and layers (those changed) by form; csr_layers, fastest and latency_seconds (by form)
        by batch size. Empty if nothing was exported.
        """
        self.peak_memory: dict[int, int] = {}
        """Peak memory in bytes, by rank."""
        self.errors: list[dict[str, Any]] = []
        """rank, type, message and traceback of every exception that ended a rank; text is untrusted."""
        self.skipped_lines = 0
        """Complete lines that could not be read."""
        self._ranks: list[_Rank] = []
        self._first_known = False
        self._weighted = GrowingArray(np.float64)
        self._samples = GrowingArray(np.float64)  # a rank may hold a part of each sample
        self._elapsed = GrowingArray(np.float64)
        self._origin: float | None = None
        self._spans = {name: GrowingArray(np.float32) for name in _SPANS}
        self._exchanged = {name: GrowingArray(np.float64) for name in _EXCHANGED}
        self._sent = GrowingArray(np.float64)
        self._pauses: list[tuple[float, float]] = []
        """When rank 0 went on after what was no update, and how long that had taken."""
        self._grad_norm = GrowingArray(np.float64)  # the parity proof compares it to 1e-9
        self._lr = GrowingArray(np.float32)
        self.rehearsal_seconds: dict[int, float] = {}
        """How long each rank tried the task before step 1 (s)."""
        self._stamps: dict[str, tuple[int, int, int]] = {}
        self._turn = 0
        self._drawn = False
        """Ranks draw their work instead of taking a share of every update."""
        self._ended = GrowingArray(np.float64)
        """When each piece of drawn work was done, in the order of reading."""
        self._order: NDArray[np.int64] = np.zeros(0, np.int64)
        """The same pieces in the order of time."""
        self._loss: Floats | None = None

    # -- reading ----------------------------------------------------------------------------------------------------

    def refresh(self, budget_s: float | None = None) -> bool:
        """Read what is new in the files for at most about `budget_s` seconds; True when everything has been read."""
        deadline = math.inf if budget_s is None else time.perf_counter() + budget_s
        self._read_states()
        self._find_ranks()
        waiting = len(self._ranks)
        while waiting:
            number = self._turn % len(self._ranks)
            waiting = waiting - 1 if self._read_some(number, deadline) else len(self._ranks)
            # A rank cut short by the clock goes on next time; the others get their turn in the order they stand.
            self._turn = number + 1
            if time.perf_counter() >= deadline:
                return waiting == 0
        return True

    def _read_states(self) -> None:
        for name in ("status", "progress", "summary"):
            path = getattr(self.directory, name)
            try:
                info = os.lstat(path)
            except OSError:
                continue
            stamp = (info.st_mtime_ns, info.st_size, info.st_ino)
            if stamp == self._stamps.get(name):
                continue
            found = read_json(path)
            if isinstance(found, dict):
                self._stamps[name] = stamp
                setattr(self, name, found)

    def _find_ranks(self) -> None:
        world = _integer(self.status.get("world_size"), 1, MAX_RANKS)
        if world is None and not self._ranks:
            try:
                found = [_FILE.fullmatch(name) for name in os.listdir(self.directory.path)]
            except OSError:
                found = []
            world = max((int(match[1]) + 1 for match in found if match), default=0)
        while len(self._ranks) < min(world or 0, MAX_RANKS):
            self._ranks.append(_Rank())

    def _read_some(self, number: int, deadline: float) -> bool:
        """Read one piece of a rank's file; True if nothing complete was left to read."""
        rank, path = self._ranks[number], self.directory.events(number)
        try:
            if rank.unreadable_bytes > MAX_UNREADABLE_BYTES or os.lstat(path).st_size <= rank.offset:
                return True
            with safe_files.reading(path) as file:
                piece = os.pread(file, _CHUNK_BYTES, rank.offset)
                while b"\n" not in piece and len(piece) < MAX_LINE_BYTES:
                    more = os.pread(file, _CHUNK_BYTES, rank.offset + len(piece))
                    if not more:
                        break
                    piece += more
        except OSError:
            return True
        end = piece.rfind(b"\n")
        if end < 0:
            if len(piece) >= MAX_LINE_BYTES:  # no event of ours is that long: drop it up to its end
                rank.offset += len(piece)
                rank.unreadable_bytes += len(piece)
                rank.in_long_line = True
                return False
            return True  # an unfinished last line
        start = 0
        while start <= end:
            stop = piece.index(b"\n", start)
            self._read_line(number, piece[start:stop])
            start = stop + 1
            if time.perf_counter() >= deadline:
                break
        rank.offset += start
        return False

    def _read_line(self, number: int, line: bytes) -> None:
        rank = self._ranks[number]
        if rank.in_long_line:
            rank.in_long_line = False
            self.skipped_lines += 1
            return
        if not line.strip():
            return
        try:
            event = safe_files.from_json(line, bounded_numbers=False)
            kind = event.get("event") if isinstance(event, dict) else None
            handler = _HANDLERS.get(kind) if isinstance(kind, str) else None
            if handler is not None and handler(self, number, event):
                return
        except (ValueError, RecursionError, OverflowError):
            pass
        self.skipped_lines += 1
        rank.unreadable_bytes += len(line)

    # -- one method per kind of event; False when it cannot be read -----------------------------------------------

    def _start(self, number: int, event: dict[str, Any]) -> bool:
        self._note_first(event.get("first"))
        rank = self._ranks[number]
        device = event.get("device")
        rank.start = {
            "device": device[:100] if isinstance(device, str) else "",
            "pid": _integer(event.get("pid"), 0, 2**31),
            "threads": _integer(event.get("threads"), 0, 2**16),
            "parameters": _integer(event.get("parameters"), 0, 2**62),
            "steps": _integer(event.get("steps"), 1, MAX_STEPS),
            "time_to_first_step_seconds": _number(event.get("time_to_first_step_seconds")),
            "effective": {},
        }
        said = event.get("warnings")
        rank.start["warnings"] = [str(text)[:400] for text in said[:20]] if isinstance(said, list) else []
        rank.start["effective"] = _words(event.get("effective"))
        if number == 0:
            if isinstance(event.get("facts"), dict):
                self.facts = event["facts"]
            metric = event.get("metric")
            if isinstance(metric, dict) and isinstance(metric.get("key"), str):
                self.metric = {
                    "key": metric["key"][:100],
                    "title": str(metric.get("title") or metric["key"])[:200],
                    "higher_is_better": bool(metric.get("higher_is_better", True)),
                    "unit": str(metric.get("unit") or "")[:40],
                }
        return True

    def _first_step(self, number: int, event: dict[str, Any]) -> bool:
        self._ranks[number].start["time_to_first_step_seconds"] = _number(event.get("seconds"))
        return True

    def _note_first(self, first: Any) -> None:
        known = _integer(first, 0, MAX_STEPS)
        if known is not None and not self._first_known:
            self.first, self._first_known = known, True

    def _steps(self, number: int, event: dict[str, Any]) -> bool:
        first, seconds = _integer(event.get("first"), 0, MAX_STEPS), _column(event.get("seconds"))
        if first is None or seconds is None or not len(seconds):
            return False
        self._note_staleness(event.get("staleness"))
        if "ticket" in event:
            return self._pieces(number, event, seconds)
        self._note_first(first)
        rank, count = self._ranks[number], len(seconds)
        begin = first - self.first
        drop = max(0, rank.steps - begin)  # steps already known are not counted twice
        if drop >= count or begin > rank.steps + MAX_GAP or begin + count > MAX_STEPS:
            return False
        at = begin + drop
        rank.seconds.write(at, _narrow(seconds[drop:]), np.nan)
        rank.note_compute(event, at, drop, count)
        rank.steps = at + count - drop
        loss, samples = _column(event.get("loss"), count), _column(event.get("samples"), count)
        if loss is not None and samples is not None:
            weight = np.nan_to_num(np.clip(samples[drop:], 0, 1e12), nan=0.0, posinf=0.0, neginf=0.0)
            with np.errstate(all="ignore"):
                part = np.where(weight > 0, loss[drop:] * weight, 0.0)
            self._loss = None
            self._weighted.add(at, np.where(np.isfinite(part), part, np.inf))
            self._samples.add(at, weight)
            self._note_sent(event, at, drop, count)
        if number == 0:
            self._note_parts(at, drop, count, event)
            for name, column in (("grad_norm", self._grad_norm), ("lr", self._lr)):
                values = _column(event.get(name), count)
                column.write(at, values[drop:] if values is not None else np.full(count - drop, np.nan), np.nan)
            self._note_elapsed(at, seconds[drop:], _number(event.get("monotonic")))
        return True

    def _note_parts(self, at: int, drop: int, count: int, event: dict[str, Any]) -> None:
        """Where the time of rank 0's steps went; of drawn work, where that of each rank's pieces did."""
        for name, column in (self._spans | self._exchanged).items():
            values = _column(event.get(name), count)
            known = values[drop:] if values is not None else np.full(count - drop, np.nan)
            column.write(at, _narrow(known) if name in self._spans else known, np.nan)

    def _pieces(self, number: int, event: dict[str, Any], seconds: Floats) -> bool:
        """Steps of ranks that draw their work: each is a share of some update, and a rank makes as many as it can."""
        count, shares = len(seconds), len(self._ranks)
        columns = [_column(event.get(name), count) for name in ("ticket", "ended", "loss", "samples")]
        ticket, ended, loss, samples = columns
        if ticket is None or ended is None or loss is None or samples is None:
            return False
        room = MAX_STEPS * shares
        if not (np.isfinite(ended).all() and (ticket >= 0).all() and (ticket < room).all()):
            return False
        if self._ended.length + count > room:
            return False
        rank, update = self._ranks[number], ticket.astype(np.int64) // shares - self.first
        known = self._ended.length // shares
        if update.min() < 0 or update.max() > known + MAX_GAP:
            return False
        self._drawn, self._loss = True, None
        self._note_parts(self._ended.length, 0, count, event)
        rank.seconds.write(rank.steps, _narrow(seconds), np.nan)
        rank.note_compute(event, rank.steps, 0, count)
        rank.steps += count
        self._ended.write(self._ended.length, ended, 0.0)
        weight = np.nan_to_num(np.clip(samples, 0, 1e12), nan=0.0)
        with np.errstate(all="ignore"):
            part = np.where(weight > 0, loss * weight, 0.0)
        sent = _column(event.get("bytes"), count)
        added = [(self._weighted, np.where(np.isfinite(part), part, np.inf)), (self._samples, weight)]
        if sent is not None:
            added.append((self._sent, _counts(sent)))
        for column, values in added:
            column.add_at(update, values)
        if self._origin is None or float(ended[0] - seconds[0]) < self._origin:
            self._origin = float(ended[0] - np.nan_to_num(seconds[0]))
        return True

    def _by_time(self, pieces: NDArray[Any]) -> NDArray[Any]:
        """Figures of drawn work, which stand in the order of reading, in the order of time."""
        if len(self._order) != self._ended.length:
            self._order = np.argsort(self._ended.values, kind="stable")
        return pieces[self._order]

    def _note_sent(self, event: dict[str, Any], at: int, drop: int, count: int) -> None:
        sent = _column(event.get("bytes"), count)
        if sent is not None:
            self._sent.add(at, _counts(sent[drop:]))

    def _note_staleness(self, values: Any) -> None:
        found = _column(values)
        if found is None or not len(found):
            return
        whole = np.clip(found[np.isfinite(found)], 0, MAX_STALENESS).astype(np.int64)
        counts = np.bincount(whole, minlength=len(self.staleness))
        counts[: len(self.staleness)] += self.staleness
        self.staleness = counts

    def _note_elapsed(self, at: int, seconds: Floats, end: float | None) -> None:
        """Clock times of the ends of these steps: the batch carries the time at which its last step ended."""
        seconds = np.nan_to_num(np.clip(seconds, 0, 1e9), nan=0.0)
        before = float(self._elapsed.values[-1]) if self._elapsed.length else 0.0
        along = np.cumsum(seconds)
        if end is not None and self._origin is None:
            self._origin = end - float(along[-1]) - before
        last = before + float(along[-1]) if end is None or self._origin is None else end - self._origin
        times = last - float(along[-1]) + along
        if not math.isfinite(last) or last < before or last > 1e10:
            times = before + along
        self._elapsed.write(at, np.maximum.accumulate(np.maximum(times, before)), before)

    def _evaluation(self, number: int, event: dict[str, Any]) -> bool:
        step, metrics = _integer(event.get("step"), 0, MAX_STEPS), event.get("metrics")
        if step is None or not isinstance(metrics, dict) or len(self.evaluations) >= MAX_EVENTS:
            return False
        numbers = {str(key)[:100]: value for key, item in metrics.items() if (value := _figure(item)) is not None}
        now = _number(event.get("monotonic"))
        self._note_pause(number, event)
        elapsed = 0.0 if now is None or self._origin is None else min(max(0.0, now - self._origin), 1e10)
        self.evaluations.append((step, elapsed, numbers))
        return True

    def _sparsity(self, number: int, event: dict[str, Any]) -> bool:
        step, layers = _integer(event.get("step"), 0, MAX_STEPS), event.get("layers")
        if number or step is None or not isinstance(layers, dict) or len(self.sparsity) >= MAX_EVENTS:
            return False
        found: dict[str, tuple[int, int, float]] = {}
        for name, counts in list(layers.items())[:MAX_BLOCKS]:
            if not isinstance(counts, list) or len(counts) != 3:
                return False
            size, churn = _integer(counts[1], 1, 2**62), _number(counts[2])
            zeros = _integer(counts[0], 0, size or 0)
            if size is None or zeros is None or churn is None:
                return False
            found[str(name)[:200]] = (zeros, size, min(max(churn, 0.0), 1.0))
        if found:
            self.sparsity.append((step, found))
        return bool(found)

    def _communication(self, number: int, event: dict[str, Any]) -> bool:
        found = {key: _number(event.get(key)) for key in _EXCHANGES}
        known = self.communication or {}
        for key, value in found.items():
            if value is not None:
                known[key] = max(value, known.get(key, 0.0))
        self.communication = known or None
        counted = found["counted_bytes_per_step"]
        if counted is not None:
            self.counted[number] = counted
        if isinstance(event.get("method"), str):
            self.compressor = event["method"][:100]
        axes = _axes(event.get("axes"))
        if axes:
            self.traffic[number] = axes
        return bool(known)

    def _trace(self, number: int, event: dict[str, Any]) -> bool:
        step = _integer(event.get("step"), 1, MAX_STEPS)
        if step is None or number in self.memory:
            return False
        measured, formula = (_sizes(event.get(name)) for name in ("memory", "formula"))
        if measured is None or formula is None:
            return False
        self.traced, self.memory[number], self.formula[number] = step, measured, formula
        axes = _axes(event.get("traffic"))
        if axes:
            self.traffic[number] = axes
        rows = event.get("timeline")
        room = MAX_ACTIONS - sum(map(len, self.timeline.values()))
        actions = [action for row in rows[:room] if (action := _action(row))] if isinstance(rows, list) else []
        if actions:
            self.timeline[number] = sorted(actions, key=lambda action: action.begin)
        loads = event.get("experts")
        for name, counts in list(loads.items())[:MAX_BLOCKS] if isinstance(loads, dict) else ():
            self._add_load(str(name)[:100], counts)
        return True

    def _add_load(self, block: str, counts: Any) -> None:
        if not isinstance(counts, list) or not 0 < len(counts) <= MAX_EXPERTS:
            return
        whole = [_integer(count, 0, 2**40) for count in counts]
        known = self.experts.get(block)
        if None in whole or (known is not None and len(known) != len(whole)) or len(self.experts) >= MAX_BLOCKS:
            return
        load = np.array(whole, dtype=np.int64)
        self.experts[block] = load if known is None else known + load

    def _link(self, number: int, event: dict[str, Any]) -> bool:
        found = {key: _number(event.get(key)) for key in LINK}
        known = {key: value for key, value in found.items() if value is not None and 0 <= value < 1e18}
        if len(known) == len(LINK):
            self.links[number] = known
        return number in self.links

    def _effective(self, number: int, event: dict[str, Any]) -> bool:
        """What was found to be in force once the training was over."""
        found, start = _words(event.get("found")), self._ranks[number].start
        start["effective"] = dict(list((start.get("effective", {}) | found).items())[:MAX_EFFECTIVE])
        return bool(found)

    def _quantized(self, number: int, event: dict[str, Any]) -> bool:
        found: dict[str, Any] = {name: str(event.get(name) or "")[:100] for name in ("method", "qat")}
        found |= {name: _integer(event.get(name), 0, 2**40) for name in ("layers", "samples")}
        found["seconds"] = _number(event.get("seconds"))
        found |= {name: _pair(event.get(name)) for name in ("bytes", "layer_bytes")}
        metrics, latency = event.get("metrics"), event.get("latency_seconds")
        if number or self.quantized or not isinstance(metrics, dict) or not isinstance(latency, dict):
            return False
        found["metrics"] = {name: _numbers(metrics.get(name), _figure) for name in BESIDE}
        sizes = [(_size(size), _pair(both)) for size, both in list(latency.items())[:MAX_SIZES]]
        found["latency_seconds"] = {size: both for size, both in sizes if size is not None and both}
        rows = event.get("sensitivity")
        found["sensitivity"] = [
            (str(row[0])[:200], _number(row[1]))
            for row in (rows[:MAX_BLOCKS] if isinstance(rows, list) else ())
            if isinstance(row, list) and len(row) == 2
        ]
        self.quantized = found
        return True

    def _numbers(self, number: int, event: dict[str, Any]) -> bool:
        layers = numbers.read(event.get("layers"), min(MAX_LAYERS, 16 * MAX_LAYERS - len(self.numbers)))
        known = {layer.name for layer in self.numbers}
        layers = [layer for layer in layers if layer.name not in known]
        if not layers:
            return False
        self.numbers = sorted([*self.numbers, *layers], key=lambda layer: layer.stage)
        counts = event.get("multiplied")
        for words, count in list(counts.items())[:MAX_EFFECTIVE] if isinstance(counts, dict) else ():
            many = _integer(count, 1, 2**20)
            if many is not None and len(self.multiplied) < MAX_EFFECTIVE:
                self.multiplied[words[:100]] = self.multiplied.get(words[:100], 0) + many
        return True

    def _kernels(self, number: int, event: dict[str, Any]) -> bool:
        found = kernels.read(event.get("kinds"))
        if number or self.kernels or not found:
            return False
        self.kernels, self.without_kernel = found, _integer(event.get("left_out"), 0, 2**20) or 0
        return True

    def _exported(self, number: int, event: dict[str, Any]) -> bool:
        metrics, latency = event.get("metrics"), event.get("latency_seconds")
        if number or self.exported or not isinstance(metrics, dict) or not isinstance(latency, dict):
            return False
        found: dict[str, Any] = {name: _integer(event.get(name), 0, 2**62) for name in ("samples", "file_bytes")}
        found["seconds"] = _number(event.get("seconds"))
        found["saved"] = event.get("saved") if event.get("saved") in tuple(FORMS) else ""
        found["metrics"] = {form: _numbers(metrics[form], _figure) for form in FORMS if form in metrics}
        found["bytes"] = _by_form(event.get("bytes"))
        found["layers"] = {form: int(count) for form, count in _by_form(event.get("layers")).items()}
        sizes = [(_size(size), _by_form(seconds)) for size, seconds in list(latency.items())[:MAX_SIZES]]
        found["latency_seconds"] = {size: seconds for size, seconds in sizes if size is not None and seconds}
        found["fastest"] = {size: min(seconds, key=seconds.__getitem__) for size, seconds in sizes if size and seconds}
        found["csr_layers"] = {
            at: int(count) for size, count in _numbers(event.get("csr_layers")).items() if (at := _size(size))
        }
        self.exported = found
        return True

    def _rehearsal(self, number: int, event: dict[str, Any]) -> bool:
        """Take what the trial of the task before step 1 took; what it found is said by the run's warnings."""
        seconds = _number(event.get("seconds"))
        if seconds is not None and 0 <= seconds < 1e9:
            self.rehearsal_seconds[number] = seconds
        return number in self.rehearsal_seconds

    def _memory(self, number: int, event: dict[str, Any]) -> bool:
        peak = _integer(event.get("peak_bytes"), 0, 2**62)
        if peak is not None:
            self.peak_memory[number] = max(peak, self.peak_memory.get(number, 0))
        return peak is not None

    def _error(self, number: int, event: dict[str, Any]) -> bool:
        if len(self.errors) >= MAX_RANKS:
            return False
        limits = {"type": 200, "message": 2000, "traceback": 20_000}
        text = {key: str(event.get(key) or "")[-limit:] for key, limit in limits.items()}
        self.errors.append({"rank": number, **text})
        return True

    def _end(self, number: int, event: dict[str, Any]) -> bool:
        self._ranks[number].end = str(event.get("reason") or "finished")[:100]
        return True

    def _checkpoint(self, number: int, event: dict[str, Any]) -> bool:
        self._note_pause(number, event)
        return True

    def _note_pause(self, number: int, event: dict[str, Any]) -> None:
        """An evaluation or a checkpoint is over: its event tells how long it took."""
        now, took = _number(event.get("monotonic")), _number(event.get("seconds"))
        if number == 0 and now is not None and took is not None and 0 <= took < 1e9 and len(self._pauses) < MAX_EVENTS:
            self._pauses.append((now, took))

    # -- what is known ------------------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """The state as written down (not reconciled with what processes live), or `starting`."""
        state = self.status.get("state")
        return state if isinstance(state, str) else "starting"

    @property
    def done(self) -> bool:
        """The run has a terminal state."""
        return self.state in TERMINAL

    @property
    def draws(self) -> bool:
        """Ranks draw one piece of work after the other (asynchronous updates) instead of taking a share of each."""
        return self._drawn

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self._ranks)

    @property
    def total_steps(self) -> int | None:
        """Updates at the end of the run, counted like `step`; None if unknown."""
        known = _integer(self.status.get("steps"), 1, MAX_STEPS)
        if known is None and self._ranks:  # given as epochs: only the ranks know how many steps that is
            known = self._ranks[0].start.get("steps")
        return known

    @property
    def rank_steps(self) -> list[int]:
        """Steps reported by each rank (counted from `first`)."""
        return [rank.steps for rank in self._ranks]

    @property
    def rank_starts(self) -> list[dict[str, Any]]:
        """What each rank told when it was ready: device, pid, threads, parameters, steps,
        time_to_first_step_seconds (None until known) and effective; {} before that.
        """
        return [rank.start for rank in self._ranks]

    @property
    def steps(self) -> int:
        """Number of steps whose global loss is complete; of drawn work, as many as it makes up."""
        if self._drawn:
            return min(self._ended.length // max(1, len(self._ranks)), self._samples.length)
        counted = [rank.steps for rank in self._ranks if rank.steps or not self.done]
        return min(min(counted, default=0), self._samples.length)

    @property
    def step(self) -> NDArray[np.int64]:
        """Updates done after each complete step, int64 (steps,): first + 1, first + 2, …"""
        return np.arange(self.first + 1, self.first + self.steps + 1, dtype=np.int64)

    @property
    def loss(self) -> Floats:
        """Global mean loss of each step (steps,); inf where it was not a finite number, never NaN.

        A step that no file holds any more (a lost line) repeats the one before it.
        """
        count = self.steps
        if self._loss is not None and len(self._loss) == count:
            return self._loss
        samples = self._samples.values[:count]
        loss = self._weighted.values[:count] / np.where(samples > 0, samples, 1)
        known = samples > 0
        if not known.all() and known.any():
            source = np.maximum.accumulate(np.where(known, np.arange(count), -1))
            source[source < 0] = int(np.argmax(known))
            loss = loss[source]
        loss.flags.writeable = False
        self._loss = loss
        return loss

    @property
    def samples(self) -> NDArray[np.int64]:
        """Samples of each step over all ranks (steps,)."""
        whole = np.rint(self._samples.values[: self.steps]).astype(np.int64)
        whole.flags.writeable = False
        return whole

    @property
    def elapsed(self) -> Floats:
        """Seconds from the start of the first step to the end of each step, never falling (steps,)."""
        count = self.steps
        if self._drawn:  # update t is done when as much work is done as t updates have
            shares = len(self._ranks)
            ends = self._by_time(self._ended.values)[shares - 1 : count * shares : shares] - (self._origin or 0.0)
            return np.maximum.accumulate(np.clip(ends, 0.0, 1e10))
        if self._elapsed.length >= count:
            return self._elapsed.values[:count]
        present = next((rank for rank in self._ranks if rank.steps >= count), None)  # rank 0's file is lost
        seconds = present.seconds.values[:count] if present else np.zeros(count, np.float32)
        return np.cumsum(np.nan_to_num(np.clip(seconds, 0, 1e9), nan=0.0), dtype=np.float64)

    @property
    def training_seconds(self) -> Floats:
        """Seconds of training up to the end of each step: evaluations and checkpoints are left out (steps,)."""
        count = self.steps
        if self._drawn:
            shares, origin = len(self._ranks), self._origin or 0.0
            ends = self._by_time(self._ended.values)[shares - 1 : count * shares : shares]
            pauses = sorted(pause for pause in self._pauses if pause[0] >= origin)
            before = np.searchsorted([end for end, _ in pauses], ends, side="right")
            paused = np.concatenate([[0.0], np.cumsum([took for _, took in pauses])])[before]
            return np.maximum.accumulate(np.clip(ends - origin - paused, 0.0, 1e10))
        known = [rank.seconds.values[:count] for rank in self._ranks if rank.steps >= count]
        clean = [np.nan_to_num(np.clip(seconds, 0, 1e9), nan=0.0).astype(np.float64) for seconds in known]
        # A step is done when the last rank has done it; ranks of a local method run ahead of each other.
        return np.max([np.cumsum(seconds) for seconds in clean], axis=0) if clean else np.zeros(count)

    @property
    def seconds(self) -> list[NDArray[np.float32]]:
        """Per rank, the duration of its steps in seconds; NaN where lost. Of drawn work, that of all ranks together."""
        if self._drawn:
            together = np.diff(self.training_seconds, prepend=0.0).astype(np.float32)
            return [together] * len(self._ranks)
        return [rank.seconds.values for rank in self._ranks]

    @property
    def pass_seconds(self) -> list[NDArray[np.float32]]:
        """Per rank, the duration of what it did itself: its steps, or the pieces that it drew."""
        return [rank.seconds.values for rank in self._ranks]

    @property
    def compute(self) -> list[NDArray[np.float32]]:
        """Per rank, the seconds of each step (or piece that it drew) in which it computed; NaN where not known.

        Waiting for others is left out.
        """
        return [rank.compute.values for rank in self._ranks]

    @property
    def spans(self) -> dict[str, NDArray[np.float32]]:
        """Rank 0's data, forward, backward and optimizer time of each step in seconds; NaN where unknown. Of drawn
        work: those of every piece of all ranks, in the order of time.
        """
        if self._drawn:
            return {name: self._by_time(span.values) for name, span in self._spans.items()}
        return {name: span.values for name, span in self._spans.items()}

    @property
    def grad_norm(self) -> Floats:
        """Global gradient norm of each step (steps,); NaN where it was not written down."""
        return self._padded(self._grad_norm)

    @property
    def lr(self) -> Floats:
        """Learning rate of each step (steps,); NaN where it was not written down."""
        return self._padded(self._lr)

    @property
    def exchanged(self) -> dict[str, Floats]:
        """What combining the gradients of each step has cost rank 0 (steps,): bytes that it sent, seconds in which
        nothing was computed meanwhile (exposed) and seconds of compression; NaN where it was not written down. Of
        drawn work: those of every piece of all ranks, in the order of time.
        """
        if self._drawn:
            return {name: self._by_time(column.values) for name, column in self._exchanged.items()}
        return {name: self._padded(column) for name, column in self._exchanged.items()}

    @property
    def sent(self) -> Floats:
        """Bytes that all ranks together sent to combine what they learned in each step (steps,); NaN where nobody
        counted. One rank sends nothing.
        """
        return np.zeros(self.steps) if len(self._ranks) == 1 else self._padded(self._sent)

    def _padded(self, column: GrowingArray) -> Floats:
        count = self.steps
        values = column.values[:count].astype(np.float64)
        return np.concatenate([values, np.full(count - len(values), np.nan)])


_HANDLERS = {
    "rehearsal": RunData._rehearsal,
    "start": RunData._start,
    "first_step": RunData._first_step,
    "steps": RunData._steps,
    "evaluation": RunData._evaluation,
    "checkpoint": RunData._checkpoint,
    "trace": RunData._trace,
    "communication": RunData._communication,
    "sparsity": RunData._sparsity,
    "link": RunData._link,
    "effective": RunData._effective,
    "quantized": RunData._quantized,
    "numbers": RunData._numbers,
    "kernels": RunData._kernels,
    "exported": RunData._exported,
    "memory": RunData._memory,
    "error": RunData._error,
    "end": RunData._end,
}


def _sizes(value: Any) -> dict[str, int] | None:
    """Bytes by kind of memory, or None."""
    if not isinstance(value, dict):
        return None
    found = {kind: _integer(round(size), 0, 2**62) for kind in KINDS if (size := _number(value.get(kind))) is not None}
    return {kind: size for kind, size in found.items() if size is not None}


def _axes(value: Any) -> dict[str, dict[str, float]]:
    """Traffic by axis; what cannot be read is left out."""
    found: dict[str, dict[str, float]] = {}
    for name, counts in list(value.items())[:MAX_AXES] if isinstance(value, dict) else ():
        if not isinstance(counts, dict) or not _AXIS.fullmatch(name):
            continue
        numbers = {key: _number(counts.get(key)) for key in TRAFFIC}
        if all(number is not None and 0 <= number < 1e18 for number in numbers.values()):
            found[name] = {key: number for key, number in numbers.items() if number is not None}
    return found


def _action(row: Any) -> Action | None:
    """A row of a timeline: kind, stage, microbatch, begin, end."""
    if not isinstance(row, list) or len(row) != 5 or row[0] not in ("F", "B", "I", "W"):
        return None
    stage, microbatch = _integer(row[1], 0, MAX_RANKS), _integer(row[2], 0, MAX_STEPS)
    begin, end = _number(row[3]), _number(row[4])
    if stage is None or microbatch is None or begin is None or end is None or not 0 <= begin <= end < 1e12:
        return None
    return Action(row[0], stage, microbatch, begin, end)


def _words(value: Any) -> dict[str, str]:
    """A dict as short texts."""
    items = list(value.items())[:MAX_EFFECTIVE] if isinstance(value, dict) else []
    return {str(key)[:100]: str(item)[:200] for key, item in items}


def _numbers(value: Any, read: Callable[[Any], float | None] = _number) -> dict[str, float]:
    """Return the numbers of a dict by name; with `read=_figure`, NaN for those that are not finite."""
    items = list(value.items())[:MAX_EFFECTIVE] if isinstance(value, dict) else []
    return {str(key)[:100]: number for key, item in items if (number := read(item)) is not None}


def _pair(value: Any) -> dict[str, float]:
    """A positive number of the network as it is, and one of the quantized network; {} where one is missing."""
    found = _numbers({name: value.get(name) for name in BESIDE} if isinstance(value, dict) else None)
    return found if len(found) == len(BESIDE) and all(0 < number < 1e18 for number in found.values()) else {}


def _by_form(value: Any) -> dict[str, float]:
    """A number of each form of an exported network, 0 or more."""
    found = _numbers({form: value.get(form) for form in FORMS} if isinstance(value, dict) else None)
    return {form: number for form, number in found.items() if 0 <= number < 1e18}


def _size(text: str) -> int | None:
    """A batch size; JSON's names are texts."""
    return int(text) if re.fullmatch(r"[1-9][0-9]{0,6}", text) else None


def _column(values: Any, count: int | None = None) -> Floats | None:
    """A list of numbers as an array (null and not-a-number become NaN); None for anything else or another length."""
    if not isinstance(values, list) or (count is not None and len(values) != count):
        return None
    if not values:
        return np.zeros(0)
    try:
        array = np.array(values)
    except ValueError:  # a ragged list
        array = np.empty(0, dtype=object)
    if array.ndim == 1 and array.dtype.kind in "fiu" and len(array) == len(values):
        return array.astype(np.float64)
    return np.array([_loose(value) for value in values])


def _loose(value: Any) -> float:
    number = _number(value)
    return math.nan if number is None else number


def _counts(values: Floats) -> Floats:
    """As counts: what is no number between 0 and 1e18 is 0."""
    return np.nan_to_num(np.clip(values, 0, 1e18), nan=0.0)


def _narrow(values: Floats) -> NDArray[np.float32]:
    """As float32; what does not fit becomes infinite, without a warning."""
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(np.float32)
