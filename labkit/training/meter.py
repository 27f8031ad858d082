"""The meter of one rank: it writes where each step's time goes every 250 ms and costs less than 0.5 % of that time.

The training loop only marks the borders between phases; it computes and writes nothing. A background thread turns the
marks into seconds once the device has passed them, appends a batch of steps to the rank's event file, sends heartbeats
to the supervisor, and ends the process when the supervisor is gone.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from labkit.experiment.process_memory import peak_resident_bytes, resident_bytes
from labkit.experiment.run_directory import PHASES
from labkit.gradients.exchange import Counters
from labkit.training.clock import PassClock, clock, finish
from labkit.training.events import EventWriter

FLUSH_S = 0.25
SPANS = ("data", "forward", "backward", "optimizer")
_PHASE_NUMBERS = {name: number for number, name in enumerate(PHASES)}


class Board(Protocol):
    """Interface to the heartbeat table that a rank shares with its supervisor (labkit.launch.board)."""

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
    """Marks and measurements of one step until the background thread writes them."""

    __slots__ = (
        "compute_seconds",
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
        self.compute_seconds = 0.0
        self.grad_norm: Any = None
        self.exchanged: Counters | None = None
        self.lr = 0.0
        self.staleness: int | None = None
        self.ticket: int | None = None
        self.ended = 0.0


class Meter:
    """Records time and progress of one rank. It is a context manager; leaving it writes the remaining steps."""

    def __init__(self, events: EventWriter, rank: int, board: Board, requested: float) -> None:
        self.events, self.rank, self.board, self.requested = events, rank, board, requested
        self._clock = clock(torch.device("cpu"))
        self._device = torch.device("cpu")
        self._pass = PassClock()
        self._in_pass = False
        self.spin_wait_seconds: Callable[[], float] = float
        """Function that returns the processor seconds so far that went into waiting for other ranks."""
        self._spin_wait_at_begin = 0.0
        self.compute_seconds = self.samples = 0.0
        """Seconds that this rank computed, without waiting, and the number of samples it computed in them.

        On a CPU they belong to the last step. On a GPU they belong to the steps that it has finished since the step
        before, and only the forward passes count, because these do not wait for other ranks.
        """
        self._unmeasured: deque[_Step] = deque()
        """Steps that the GPU has not finished yet."""
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
            with contextlib.suppress(Exception):  # writes the steps before the error; the error itself matters more
                self._flush()

    def set_device(self, device: torch.device) -> None:
        """Measure on `device` from now on."""
        self._device, self._clock = device, clock(device)

    # -- called by the training loop: cheap ----------------------------------------------------------------------------

    def begin(self, number: int, lr: float, ticket: int | None = None) -> None:
        """Begin step `number` with the phase `data`; `ticket` is its number in the work queue, if there is one."""
        self._step = _Step(number)
        self._step.lr, self._step.ticket = lr, ticket
        self._number = number
        self.phase("data")

    def phase(self, name: str) -> None:
        """Begin the phase `name`: a span of the step, or something outside of steps."""
        self.board.progress(self.rank, self._number, _PHASE_NUMBERS[name])
        step = self._step
        if step is None:
            return
        step.marks.append((name, self._clock.now()))
        if self._device.type == "cuda":
            return
        if name == "forward":
            self._in_pass, self._spin_wait_at_begin = True, self.spin_wait_seconds()
            self._pass.forward()
        elif name == "backward":
            self._pass.backward()
        elif self._in_pass:
            step.compute_seconds += self.pass_seconds()
            self._in_pass = False

    def pass_seconds(self) -> float:
        """Return the seconds that the current pass has computed so far, without waiting for other ranks (on a CPU)."""
        return self._pass.seconds(self.spin_wait_seconds() - self._spin_wait_at_begin)

    def add_compute_seconds(self, seconds: float) -> None:
        """Add compute time to this step that the clocks do not see (of a rank that is slowed down on purpose)."""
        assert self._step is not None
        self._step.compute_seconds += seconds

    def loss(self, loss: Tensor, samples: float) -> None:
        """Record the mean loss over `samples` samples of this rank in this step, once per micro-batch.

        If several ranks work on the same samples, each passes only its fraction of their number.
        """
        assert self._step is not None
        self._step.losses.append((loss.detach(), samples))
        self._step.samples += samples

    def grad_norm(self, norm: Any) -> None:
        """Record the gradient norm of this step."""
        assert self._step is not None
        self._step.grad_norm = norm

    def staleness(self, updates: int) -> None:
        """Record how many updates lie between the weights the gradient was computed on and those it changed."""
        assert self._step is not None
        self._step.staleness = updates

    def cancel(self) -> None:
        """Drop this step: its gradient was not used, so it is not written."""
        self._step = None

    def exchanged(self, counted: Counters | None) -> None:
        """Record what the communication of this step cost; None if nothing was counted."""
        assert self._step is not None
        self._step.exchanged = counted

    def end(self) -> None:
        """End the step and hand it to the background thread."""
        step = self._step
        assert step is not None
        step.ended = time.monotonic()
        step.marks.append(("", self._clock.now()))
        self.compute_seconds, self.samples = (
            (step.compute_seconds, step.samples) if self._device.type == "cpu" else self._finished(step)
        )
        self._step = None
        with self._lock:
            self._waiting.append(step)
        if self._first:
            self._first = False
            if self.rank == 0:
                finish(self._device)
                self.events.write("first_step", seconds=time.monotonic() - self.requested)
        if self._failure is not None:
            self.raise_failure()

    def _finished(self, step: _Step) -> tuple[float, float]:
        """Return forward seconds and number of samples of the steps that the GPU has finished since the last call."""
        self._unmeasured.append(step)
        seconds = samples = 0.0
        while self._unmeasured and self._clock.passed(self._unmeasured[0].marks[-1][1]):
            finished = self._unmeasured.popleft()
            pairs = zip(finished.marks, finished.marks[1:], strict=False)
            forward = sum(self._clock.seconds(begin, end) for (name, begin), (_, end) in pairs if name == "forward")
            seconds, samples = seconds + forward + finished.compute_seconds, samples + finished.samples
        return seconds, samples

    def raise_failure(self) -> None:
        """Raise in the training loop what went wrong in the background thread, such as a full disk."""
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
        """Write the steps that the device has finished; with `wait`, wait for all of them."""
        if wait:
            finish(self._device)
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
            # Compute time excludes waiting. On a GPU a backward pass cannot be separated from it, so it is left out.
            compute = spans["data"] + step.compute_seconds + (spans["forward"] if on_gpu else 0.0)
            columns["compute"].append(round(compute, 7))
        if ready[0].grad_norm is not None:
            columns["grad_norm"] = [None if step.grad_norm is None else float(step.grad_norm) for step in ready]
        exchanged = [step.exchanged for step in ready if step.exchanged is not None]
        if len(exchanged) == len(ready):
            columns["bytes"] = [counters.bytes for counters in exchanged]
            columns["exposed"] = [round(counters.exposed_seconds, 7) for counters in exchanged]
            columns["compression"] = [round(counters.compression_seconds, 7) for counters in exchanged]
        if self.rank == 0:
            columns["lr"] = [step.lr for step in ready]
        if ready[0].ticket is not None:
            columns["ticket"] = [step.ticket for step in ready]
            columns["ended"] = [round(step.ended, 6) for step in ready]
        if any(step.staleness is not None for step in ready):
            columns["staleness"] = [step.staleness for step in ready]
        self.events.write("steps", first=ready[0].number, **columns)


def _read(losses: list[Tensor]) -> list[float]:
    """Return the values of `losses`, with a single copy to the host.

    On a GPU the copy runs on a separate stream. On the stream of the training loop it would wait for all the steps that
    are queued there.
    """
    if not losses:
        return []
    if losses[0].device.type != "cuda":
        return [float(loss) for loss in losses]
    with torch.cuda.stream(_copies(losses[0].device)):
        values: list[float] = torch.stack([loss.double() for loss in losses]).tolist()
    return values


@lru_cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory in bytes: of the GPU for CUDA, otherwise the resident memory of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return peak_resident_bytes()
