"""The meter of one rank: where each step's time goes, written every few hundred milliseconds, for under 0.5 % of it.

The loop marks the borders between phases; nothing is computed and nothing is written there. A background thread turns
marks into seconds once the device has passed them, appends a batch of steps to the rank's event file, tells the
supervisor that this process is alive, and ends it when the supervisor is gone.
"""

from __future__ import annotations

import contextlib
import os
import resource
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from labkit.experiment.run_directory import PHASES
from labkit.gradients.exchange import Counters
from labkit.training.clock import PassClock, clock
from labkit.training.events import EventWriter

FLUSH_S = 0.25
SPANS = ("data", "forward", "backward", "optimizer")
_PHASE_NUMBERS = {name: number for number, name in enumerate(PHASES)}


class Board(Protocol):
    """What a rank needs of the memory that it shares with its supervisor (labkit.launch.board)."""

    def progress(self, rank: int, step: int, phase: int) -> None: ...

    def heartbeat(self, rank: int, memory_bytes: int) -> None: ...

    def should_stop(self, rank: int, step: int, max_step_skew: int = 0) -> bool: ...

    @property
    def stops_at(self) -> int | None: ...

    def stop_requested(self) -> bool: ...

    def open_gate(self) -> None: ...

    @property
    def gate_open(self) -> bool: ...


class _Step:
    """The marks of one step, until they are turned into seconds."""

    __slots__ = (
        "busy",
        "ended",
        "exchanged",
        "grad_norm",
        "losses",
        "lr",
        "marks",
        "number",
        "samples",
        "staleness",
        "ticket",
    )

    def __init__(self, number: int) -> None:
        self.number = number
        self.marks: list[tuple[str, Any]] = []
        self.losses: list[tuple[Tensor, float]] = []
        self.samples = 0.0
        self.busy = 0.0
        self.grad_norm: Any = None
        self.exchanged: Counters | None = None
        self.lr = 0.0
        self.staleness: int | None = None
        self.ticket: int | None = None
        self.ended = 0.0


class Meter:
    """Marks time and progress for one rank. Use as a context manager: leaving it writes what is left."""

    def __init__(self, events: EventWriter, rank: int, board: Board, requested: float) -> None:
        self.events, self.rank, self.board, self.requested = events, rank, board, requested
        self._clock = clock(torch.device("cpu"))
        self._device = torch.device("cpu")
        self._pass = PassClock()
        self._in_pass = False
        self.spun: Callable[[], float] = float
        """Seconds of processor time so far that went into waiting for others."""
        self._spun = 0.0
        self.busy = self.samples = 0.0
        """Seconds that were computed, waiting left out, and for how many samples.

        On a CPU those of the last step. On a GPU those of the steps that it has finished since the step before, and
        of them the forward passes: nothing waits for other ranks there.
        """
        self._unmeasured: deque[_Step] = deque()
        """Steps that a GPU has not finished yet."""
        self._step: _Step | None = None
        self._waiting: list[_Step] = []
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._failure: BaseException | None = None
        self._first = True
        self._number = 0
        self._thread = threading.Thread(target=self._work, name="labkit-meter", daemon=True)

    def __enter__(self) -> Meter:
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._ended.set()
        self._thread.join(timeout=5)
        if kind is None:
            self.raise_failure()
            self._flush(wait=True)
        elif self._failure is None:
            with contextlib.suppress(Exception):  # the steps before the fault; the fault itself matters more
                self._flush()

    def use(self, device: torch.device) -> None:
        """Measure on this device from here on."""
        self._device, self._clock = device, clock(device)

    # -- the loop's side: cheap -----------------------------------------------------------------------------------

    def begin(self, number: int, lr: float, ticket: int | None = None) -> None:
        """Step `number` begins, with the phase `data`; where ranks draw their work, it is the one for `ticket`."""
        self._step = _Step(number)
        self._step.lr, self._step.ticket = lr, ticket
        self._number = number
        self.phase("data")

    def phase(self, name: str) -> None:
        """From here on it is `name`: a span of the step, or something outside of steps."""
        self.board.progress(self.rank, self._number, _PHASE_NUMBERS[name])
        step = self._step
        if step is None:
            return
        step.marks.append((name, self._clock.now()))
        if self._device.type == "cuda":
            return
        if name == "forward":
            self._in_pass, self._spun = True, self.spun()
            self._pass.forward()
        elif name == "backward":
            self._pass.backward()
        elif self._in_pass:
            step.busy += self.computing()
            self._in_pass = False

    def computing(self) -> float:
        """Seconds that the pass has computed so far, without waiting for others (on a CPU)."""
        return self._pass.seconds(self.spun() - self._spun)

    def computed(self, seconds: float) -> None:
        """Count so much as computing of this step that the clocks do not see (a rank made slow on purpose)."""
        assert self._step is not None
        self._step.busy += seconds

    def loss(self, loss: Tensor, samples: float) -> None:
        """Mean loss over `samples` samples of this rank in this step (one call per pass).

        Where several ranks hold parts of the same samples, each counts the fraction that is its own.
        """
        assert self._step is not None
        self._step.losses.append((loss.detach(), samples))
        self._step.samples += samples

    def grad_norm(self, norm: Any) -> None:
        assert self._step is not None
        self._step.grad_norm = norm

    def staleness(self, updates: int) -> None:
        """So many updates lie between the weights that the gradient of this step saw and those it changed."""
        assert self._step is not None
        self._step.staleness = updates

    def cancel(self) -> None:
        """Nothing came of this step: it is not written down."""
        self._step = None

    def exchanged(self, counted: Counters | None) -> None:
        """What combining the gradients of this step has cost."""
        assert self._step is not None
        self._step.exchanged = counted

    def end(self) -> None:
        """The step has ended."""
        step = self._step
        assert step is not None
        step.ended = time.monotonic()
        step.marks.append(("", self._clock.now()))
        self.busy, self.samples = (step.busy, step.samples) if self._device.type == "cpu" else self._finished(step)
        self._step = None
        with self._lock:
            self._waiting.append(step)
        if self._first:
            self._first = False
            if self.rank == 0:
                if self._device.type == "cuda":
                    torch.cuda.synchronize()
                self.events.write("first_step", seconds=time.monotonic() - self.requested)
        if self._failure is not None:
            self.raise_failure()

    def _finished(self, step: _Step) -> tuple[float, float]:
        """Return seconds of forward passes and samples of the steps that the GPU has finished since the last call."""
        self._unmeasured.append(step)
        seconds = samples = 0.0
        while self._unmeasured and self._clock.passed(self._unmeasured[0].marks[-1][1]):
            finished = self._unmeasured.popleft()
            pairs = zip(finished.marks, finished.marks[1:], strict=False)
            forward = sum(self._clock.seconds(begin, end) for (name, begin), (_, end) in pairs if name == "forward")
            seconds, samples = seconds + forward + finished.busy, samples + finished.samples
        return seconds, samples

    def raise_failure(self) -> None:
        """Raise what went wrong in the background thread (a full disk) in the loop."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    # -- the background thread ------------------------------------------------------------------------------------

    def _work(self) -> None:
        parent = os.getppid()
        while not self._ended.wait(FLUSH_S):
            if os.getppid() != parent:
                os._exit(1)  # the supervisor is gone and the parent-death signal did not come
            self.board.heartbeat(self.rank, resident_bytes())
            try:
                self._flush()
            except BaseException as error:
                self._failure = error
                return

    def _flush(self, wait: bool = False) -> None:
        """Write the steps that the device has finished."""
        if wait and self._device.type == "cuda":
            torch.cuda.synchronize()
        ready: list[_Step] = []
        with self._lock:
            while self._waiting and self._clock.passed(self._waiting[0].marks[-1][1]):
                ready.append(self._waiting.pop(0))
        if not ready:
            return
        losses = iter(_read([loss for step in ready for loss, _ in step.losses]))
        columns: dict[str, list[Any]] = {name: [] for name in ("loss", "samples", "seconds", *SPANS, "compute")}
        on_gpu = self._device.type == "cuda"
        for step in ready:
            spans = dict.fromkeys(SPANS, 0.0)
            for (name, begin), (_, end) in zip(step.marks, step.marks[1:], strict=False):
                spans[name] += self._clock.seconds(begin, end)
            total = sum(next(losses) * samples for _, samples in step.losses)
            columns["loss"].append(total / (step.samples or 1))
            columns["samples"].append(step.samples)
            columns["seconds"].append(round(self._clock.seconds(step.marks[0][1], step.marks[-1][1]), 7))
            for name in SPANS:
                columns[name].append(round(spans[name], 7))
            # Without waiting for others: a backward pass on a GPU does not tell it apart, so it is left out there.
            compute = spans["data"] + step.busy + (spans["forward"] if on_gpu else 0.0)
            columns["compute"].append(round(compute, 7))
        if ready[0].grad_norm is not None:
            columns["grad_norm"] = [None if step.grad_norm is None else float(step.grad_norm) for step in ready]
        exchanged = [step.exchanged for step in ready if step.exchanged is not None]
        if len(exchanged) == len(ready):
            columns["bytes"] = [one.bytes for one in exchanged]
            columns["exposed"] = [round(one.exposed_seconds, 7) for one in exchanged]
            columns["compression"] = [round(one.compression_seconds, 7) for one in exchanged]
        if self.rank == 0:
            columns["lr"] = [step.lr for step in ready]
        if ready[0].ticket is not None:
            columns["ticket"] = [step.ticket for step in ready]
            columns["ended"] = [round(step.ended, 6) for step in ready]
        if any(step.staleness is not None for step in ready):
            columns["staleness"] = [step.staleness for step in ready]
        self.events.write("steps", first=ready[0].number, **columns)


def _read(losses: list[Tensor]) -> list[float]:
    """Return numbers that the device has computed, with one copy to the host for all of them.

    On a GPU the copy runs on a stream of its own: on the stream of the training loop it would wait for all the steps
    that are queued there, one copy per pass.
    """
    if not losses:
        return []
    if losses[0].device.type != "cuda":
        return [float(loss) for loss in losses]
    with torch.cuda.stream(_copies(losses[0].device)):
        numbers: list[float] = torch.stack([loss.double() for loss in losses]).tolist()
    return numbers


@lru_cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def resident_bytes() -> int:
    """Memory of this process that is in RAM now (bytes)."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_bytes(torch.device("cpu"))


def peak_bytes(device: torch.device) -> int:
    """Most memory ever used: of the device for CUDA, else resident memory of this process (bytes)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
