"""The data of a run, read from its directory as it grows.

The directory is untrusted: it may come from another machine, be half written, or malicious. Nothing in a file is used
as code, as a path or as a size; a line that cannot be read is counted in `skipped_lines` and left out.

`RunData` has the columns of all steps (steps.py) and the content of the rarer events (events.py); see also reader.py.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labkit.experiment.events import EVENTS, MAX_STEPS
from labkit.experiment.run_directory import TERMINAL, RunDirectory, read_json
from labkit.runs import kernels, numbers
from labkit.runs.checked import checked_fields, integer
from labkit.runs.events import HANDLERS
from labkit.runs.gpus import GpuFile, GpuHistory
from labkit.runs.pipeline import Action
from labkit.runs.reader import MAX_RANKS, EventReader
from labkit.runs.steps import RankSteps, Steps


class RunData(Steps):
    """The events of a run as arrays. `refresh()` reads what is new; nothing else touches the disk.

    A step counts (`steps`) when every rank has reported it; a run that has ended counts every step that all ranks
    with any step have reported. Memory is bounded: the columns of the steps, and one trace per rank.
    """

    def __init__(self, directory: RunDirectory) -> None:
        super().__init__()
        self.directory = directory
        self.status: dict[str, Any] = {}
        """Content of status.json, or {}; untrusted."""
        self.progress: dict[str, Any] = {}
        """Content of progress.json, or {}; untrusted."""
        self.summary: dict[str, Any] | None = None
        """Content of summary.json once it exists; untrusted."""
        self.facts: dict[str, Any] = {}
        """Facts of the task as rank 0 reported them: classes, majority share, …; untrusted."""
        self.metric: dict[str, Any] = {}
        """key, title, higher_is_better and unit of the workload's main metric."""
        self.evaluations: list[tuple[int, float, dict[str, float]]] = []
        """(steps done, seconds since the first step began, metrics), in the order of the file.

        A metric that is not finite is NaN.
        """
        self.communication: dict[str, float] | None = None
        """The largest over the ranks, per step: bytes_per_step, exposed_seconds_per_step, and for combining gradients
        counted_bytes_per_step, formula_bytes_per_step and compression_seconds.
        """
        self.counted: dict[int, float] = {}
        """By rank, bytes sent per step to combine gradients or weights."""
        self.compressor = ""
        """Name of the compressor in use."""
        self.traced: int | None = None
        """The traced step, counted from 1, that the next five attributes describe; None before it."""
        self.memory: dict[int, dict[str, int]] = {}
        """By rank, bytes of parameters, gradients, optimizer states and activations."""
        self.formula: dict[int, dict[str, int]] = {}
        """By rank, the same by the formula of the layout, without activations."""
        self.traffic: dict[int, dict[str, dict[str, float]]] = {}
        """By rank and axis (or product of axes): calls, bytes, wire_bytes, exposed_seconds of one step."""
        self.timeline: dict[int, list[Action]] = {}
        """By rank, the actions of its pipeline stages in order."""
        self.experts: dict[str, NDArray[np.int64]] = {}
        """By block, how many tokens each of its experts got, over all ranks that see different tokens."""
        self.profiles: dict[int, dict[str, Any]] = {}
        """By rank, what it reported about its profile: step, seconds, bytes, busy_seconds (on a GPU) and note."""
        self.sparsity: list[tuple[int, dict[str, tuple[int, int, float]]]] = []
        """(steps done, by weight: counted zeros, size, and churn, the fraction of kept weights that are new), one entry
        per change of the masks.
        """
        self.links: dict[int, dict[str, float]] = {}
        """By the rank that reads its host's counters (netem/counters.py): bytes, loopback_bytes, seconds, updates."""
        self.quantized: dict[str, Any] = {}
        """The trained network compared with its quantized copy (training/after/quantized.py): method, qat, layers,
        samples, seconds, metrics, bytes, layer_bytes, latency_seconds (by batch size) and sensitivity [(layer, change
        of the loss)]; the middle four by "float" and "quantized". Empty if nothing was quantized.
        """
        self.numbers: list[numbers.Layer] = []
        """The operands of layers with a matrix product in the last evaluation, in the order of the network; of a large
        network a sample of evenly spaced layers.
        """
        self.multiplied: dict[str, int] = {}
        """Number of layers of the whole network by what they multiply: `{"int8 × ternary": 24}`."""
        self.kernels: list[kernels.Kind] = []
        """Each kind of layer of the first rank compared with a dense float32 one, the most expensive first; empty for
        runs that are dense and in full precision.
        """
        self.without_kernel = 0
        """Number of layers of the first rank that were not measured."""
        self.exported: dict[str, Any] = {}
        """The trained sparse network in several forms (training/after/exported.py): samples, seconds, saved,
        file_bytes; metrics, bytes and layers (those changed) by form; csr_layers, fastest and latency_seconds (by form)
        by batch size. Empty if nothing was exported.
        """
        self.peak_memory: dict[int, int] = {}
        """Peak memory in bytes, by rank."""
        self.errors: list[dict[str, Any]] = []
        """rank, type, message and traceback of every exception that ended a rank; text is untrusted."""
        self.rehearsal_seconds: dict[int, float] = {}
        """By rank, duration of the rehearsal before step 1 (s)."""
        self.model_flops_per_sample: float | None = None
        """Three times the products of one forward pass, per sample; None if they are not known."""
        self._reader = EventReader(directory, self._handle)
        self._gpu_file = GpuFile(directory)
        self._stamps: dict[str, tuple[int, int, int]] = {}

    def refresh(self, budget_s: float | None = None) -> bool:
        """Read what is new in the files for at most about `budget_s` seconds; True when everything has been read."""
        self._read_states()
        world_size = integer(self.status.get("world_size"), 1, MAX_RANKS)
        if world_size is None and not self._ranks:
            world_size = self._reader.ranks_with_a_file()
        while len(self._ranks) < min(world_size or 0, MAX_RANKS):
            self._ranks.append(RankSteps())
            self._reader.add_rank()
        ranks_are_read, gpus_are_read = self._reader.read(budget_s), self._gpu_file.read(budget_s)
        return ranks_are_read and gpus_are_read

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
            content = read_json(path)
            if isinstance(content, dict):
                self._stamps[name] = stamp
                setattr(self, name, content)

    def _handle(self, rank: int, event: dict[str, Any]) -> bool:
        name = event.get("event")
        declared = EVENTS.get(name) if isinstance(name, str) else None
        return declared is not None and HANDLERS[declared.name](self, rank, checked_fields(declared, event))

    def set_end(self, rank: int, reason: str) -> None:
        """Record why a rank ended."""
        self._ranks[rank].end = reason

    @property
    def disturbed_steps(self) -> list[int]:
        """Indices of steps that say nothing about speed: the profiled one, and the next, which waits for its files."""
        profiled = {profile["step"] - 1 - self.first for profile in self.profiles.values()}
        return sorted({index + later for index in profiled for later in (0, 1)})

    @property
    def skipped_lines(self) -> int:
        """Complete lines that could not be read."""
        return self._reader.skipped_lines + self._gpu_file.skipped_lines

    @property
    def gpus(self) -> list[GpuHistory]:
        """What the GPUs of the run did, in the order of CUDA; empty for a run on the CPU."""
        return self._gpu_file.gpus

    @property
    def gpu_reason(self) -> str:
        """Why there are no figures, or no further ones, of the GPUs; empty if there are. Untrusted text."""
        return self._gpu_file.reason

    @property
    def state(self) -> str:
        """State as written in status.json, without a check of the processes, or `starting`."""
        state = self.status.get("state")
        return state if isinstance(state, str) else "starting"

    @property
    def done(self) -> bool:
        """Whether the run has a terminal state."""
        return self.state in TERMINAL

    @property
    def total_steps(self) -> int | None:
        """Steps at the end of the run, counted like `step`; None if unknown."""
        steps = integer(self.status.get("steps"), 1, MAX_STEPS)
        if steps is None and self._ranks:  # given as epochs: only the ranks know how many steps that is
            steps = self._ranks[0].start.get("steps")
        return steps
