"""The monitor of the GPUs of a run: a thread of the supervisor that records once a second what each GPU does.

The thread waits for the driver, so that neither the ranks nor the supervisor have to. It never ends a run: without
NVML, or when NVML fails, it writes why there are no figures, and the run goes on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

from labkit.experiment import Experiment, Machine
from labkit.experiment.event_file import EventFile
from labkit.experiment.gpu_events import MAX_GPUS
from labkit.experiment.machine import Gpu
from labkit.experiment.run_directory import RunDirectory
from labkit.launch.gpu_window import Window
from labkit.launch.nvml import NoFigures, Nvml, NvmlGpu, Reading
from labkit.launch.run_record import log_line
from labkit.runs.processes import descends_from

INTERVAL_S = 1.0
"""Time between two readings (s)."""
MAX_SHARE = 0.005
"""The thread computes for at most this share of the time; with an expensive driver it reads less often."""
RECORDS_PER_LENGTH = 1200
"""After so many records of a GPU each further one covers twice the time, so that a long run writes few of them."""
MAX_EMPTY = 5
"""After so many readings in a row without any figure a GPU is given up."""
END_S = 2.0
"""How long the end of a run waits for the thread (s), which may be blocked in the driver."""


class _ObservedGpu:
    """One GPU of the run while it is observed."""

    def __init__(self, number: int, source: NvmlGpu, supervisor: int) -> None:
        self.number, self.source = number, source
        self.window = Window(lambda processes: others(processes, supervisor))
        self.records = self.empty = 0

    @property
    def length_s(self) -> float:
        """Time that the next record covers (s)."""
        return INTERVAL_S * 2.0 ** (self.records // RECORDS_PER_LENGTH)

    def take(self, reading: Reading) -> None:
        """Take in a reading; one without any figure counts towards giving up."""
        self.empty = self.empty + 1 if reading.is_empty else 0
        if not reading.is_empty:
            self.window.add(reading)


class GpuMonitor:
    """The thread. `start` and `stop` are called once each, by the main thread of the supervisor."""

    def __init__(self, file: EventFile, gpus: Sequence[Gpu]) -> None:
        self._file, self._gpus = file, gpus
        self._observed: list[_ObservedGpu] = []
        self._supervisor = os.getpid()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="labkit-gpus", daemon=True)

    def start(self) -> None:
        """Start the thread with all signals blocked: they are for the main thread, which waits for them."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._thread.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def stop(self) -> None:
        """Let the thread write what it has and wait for its end, for END_S seconds at most."""
        self._ended.set()
        self._thread.join(END_S)
        if self._thread.is_alive():
            log_line("NVML does not answer; the run ends without the last figures of its GPUs")

    def _run(self) -> None:
        try:
            self._record()
        finally:
            self._file.close()

    def _record(self) -> None:
        """Record until the run ends; if that fails, write why."""
        try:
            nvml = Nvml()
        except NoFigures as missing:
            self._write("gpus_unknown", reason=f"no figures of the GPUs: {missing}")
            return
        try:
            self._observe(nvml)
        except Exception as error:
            reason = f"no further figures of the GPUs: {type(error).__name__}: {error}"
            self._write("gpus_unknown", reason=reason[:400].splitlines()[0])
        finally:
            nvml.close()

    def _observe(self, nvml: Nvml) -> None:
        """Read all GPUs again and again, until the run ends or none of them answers any more."""
        for number, gpu in enumerate(self._gpus):
            try:
                self._observed.append(_ObservedGpu(number, nvml.gpu(gpu), self._supervisor))
            except NoFigures as missing:
                self._write("gpus_unknown", gpu=number, reason=f"no figures: {missing}")
            else:
                self._write("gpu", gpu=number, **self._observed[-1].source.facts())
        while self._observed:
            last = self._ended.is_set()
            begun = time.thread_time()
            self._read_all(last)
            if last:
                return
            self._ended.wait(max(INTERVAL_S, (time.thread_time() - begun) / MAX_SHARE))

    def _read_all(self, last: bool) -> None:
        """Read every GPU once; write the records that are due, all of them at the end."""
        for gpu in list(self._observed):
            gpu.take(gpu.source.read())
            if gpu.window.seconds > (0 if last else gpu.length_s - INTERVAL_S / 2):
                self._write("gpu_use", gpu=gpu.number, **gpu.window.record())
                gpu.records += 1
            if gpu.empty >= MAX_EMPTY:
                self._observed.remove(gpu)
                reason = "no further figures: NVML reports nothing of this GPU any more, which may be lost"
                self._write("gpus_unknown", gpu=gpu.number, reason=reason)

    def _write(self, event: str, **fields: object) -> None:
        """Write an event; on a full disk it is lost, and what follows is tried again."""
        if event == "gpus_unknown":
            log_line(str(fields["reason"]))
        with contextlib.suppress(OSError):
            self._file.append(event, **fields)


@contextlib.contextmanager
def monitored(directory: RunDirectory, experiment: Experiment) -> Iterator[None]:
    """Record what the GPUs of a run do while the context is open; do nothing for a run on the CPU."""
    gpus = gpus_of(experiment)
    try:
        monitor = GpuMonitor(EventFile(directory.gpus), gpus) if gpus else None
    except OSError as error:
        log_line(f"no figures of the GPUs: {error}")
        monitor = None
    if monitor is not None:
        monitor.start()
    try:
        yield
    finally:
        if monitor is not None:
            monitor.stop()


def gpus_of(experiment: Experiment) -> Sequence[Gpu]:
    """Return the GPUs of the ranks of an experiment in the order of CUDA: rank r has GPU r, modulo their number."""
    visible = Machine.here().gpus if experiment.launch.device == "cuda" else ()
    return visible[: min(experiment.layout.world_size, MAX_GPUS)]


def others(processes: Mapping[int, int], supervisor: int) -> tuple[int, int] | None:
    """Return number and memory (bytes) of the processes on a GPU that `supervisor` (pid) has not started.

    None as long as none of them is its own: before and after training, and in a container, where NVML reports the pids
    of the host, nobody can tell whose the others are.
    """
    foreign = {pid: memory for pid, memory in processes.items() if not descends_from(pid, supervisor)}
    return None if len(foreign) == len(processes) else (len(foreign), sum(foreign.values()))
