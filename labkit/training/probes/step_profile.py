"""Profile of one step by torch.profiler: a chrome trace of this rank in the run directory, which Perfetto opens.

torch allows one profiler at a time; a second one would end the first without a word. If a profiler of the user's own is
active, or anything else goes wrong, the run continues without a profile, and the event says why.

Communication may be in flight when the step ends: PipeDream has asked for its next input by then. torch would write
the end of such an operation into memory that the profiler has given back (with torch 2.13 on gloo, 3 of 40 such runs
crashed or computed other losses). A profiler of all threads has no effect on them once it has stopped, so it is used.
"""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import _profiler_enabled
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile, supported_activities

from labkit.experiment import safe_files
from labkit.experiment.chrome_trace import MAX_PACKED_BYTES, MAX_TRACE_BYTES, busy_seconds, spans
from labkit.experiment.fault import describe_error
from labkit.experiment.run_directory import RunDirectory
from labkit.training.clock import finish
from labkit.training.events import EventWriter


class NoProfile(RuntimeError):
    """Raised if a step cannot be profiled; the message is the reason."""


class StepProfile:
    """Profiles one step of a rank: `step` is a context around every step, which does nothing in all others.

    The work queue of an asynchronous update rule may give this rank nothing of that step; its next work is profiled
    then. It writes the event `profile`.
    """

    def __init__(
        self,
        directory: RunDirectory,
        rank: int,
        device: torch.device,
        scratch: Path,
        heartbeat: Callable[[], None],
        events: EventWriter,
    ) -> None:
        self._directory, self._rank, self._device = directory, rank, device
        self._scratch = scratch / f"profile-{rank}.json"
        self._heartbeat, self.events = heartbeat, events
        self._due: int | None = None

    def schedule(self, step: int, first: int, steps: int) -> None:
        """Profile `step`, counted from 1, of a run that begins after `first` of `steps` steps; 0 for none.

        Raise ValueError if the run has fewer steps. A step before `first` belongs to the run that was resumed.
        """
        if step > steps:
            raise ValueError(f"training.profile_step is {step}, but the run has only {steps} steps")
        self._due = step - 1 if step > first else None

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Profile what happens inside if `step`, counted from 0, is the one to be profiled."""
        if self._due is None or step < self._due:
            yield
            return
        self._due = None
        profiler, reason = _started(self._device)
        if profiler is None:
            yield
            self.events.write("profile", step=step + 1, note=reason)
            return
        begin = time.perf_counter()
        try:
            yield
            finish(self._device)  # so that all kernels of the step are recorded
        finally:
            seconds = time.perf_counter() - begin
            with suppress(Exception):
                profiler.stop_trace()
        self._heartbeat()
        self.events.write("profile", step=step + 1, seconds=round(seconds, 6), **self._saved(profiler))

    def _saved(self, profiler: profile) -> dict[str, Any]:
        """Write the profile into the run directory; return what the event says about it, or why there is none."""
        try:
            return self._save(profiler)
        except Exception as error:  # the disk is full, for example
            return {"note": _reason(error)}
        finally:
            with suppress(OSError):
                self._scratch.unlink()

    def _save(self, profiler: profile) -> dict[str, Any]:
        """Export the trace, check its size, and write it compressed."""
        profiler.export_chrome_trace(str(self._scratch))
        if (size := safe_files.size(self._scratch)) > MAX_TRACE_BYTES:
            raise NoProfile(f"its trace has {size >> 20} MiB, more than the {MAX_TRACE_BYTES >> 20} that are kept")
        text = safe_files.read_bytes(self._scratch, MAX_TRACE_BYTES)
        packed = gzip.compress(text, 6)
        if len(packed) > MAX_PACKED_BYTES:
            raise NoProfile(
                f"its file has {len(packed) >> 20} MiB, more than the {MAX_PACKED_BYTES >> 20} that are kept"
            )
        path = self._directory.profile(self._rank)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if not safe_files.is_folder(path.parent):
            raise NoProfile(f"{path.parent.name} in the run directory is not a folder")
        safe_files.replace(path, packed)
        fields = {"file": str(path.relative_to(self._directory.path)), "bytes": len(packed)}
        return fields | ({"busy_seconds": busy_seconds(spans(text))} if self._device.type == "cuda" else {})


def _started(device: torch.device) -> tuple[profile | None, str]:
    """Return a profiler that records this process and "", or None and why there is none."""
    try:
        return _start(device), ""
    except Exception as error:
        return None, _reason(error)


def _start(device: torch.device) -> profile:
    """Start a profiler; raise NoProfile if another one is active."""
    if _profiler_enabled() or torch.autograd.profiler._is_profiler_enabled:
        raise NoProfile("another profiler is active in this process")
    activities = {ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])}
    everywhere = _ExperimentalConfig(profile_all_threads=True)
    profiler = profile(activities=sorted(activities & supported_activities(), key=str), experimental_config=everywhere)
    profiler.prepare_trace()
    profiler.start_trace()
    return profiler


def _reason(error: Exception) -> str:
    reason = str(error) if isinstance(error, NoProfile) else describe_error(error)
    return f"this step was not profiled: {reason}"
