"""The entry of one rank, called in a process that its supervisor has just forked."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path
from typing import Any

import torch

import labkit
from labkit.experiment import Experiment
from labkit.experiment.failures import message_of
from labkit.experiment.fault import TaskFault, named
from labkit.experiment.registry import registry
from labkit.experiment.run_directory import EXIT_STOPPED, RunDirectory
from labkit.training.events import EventWriter
from labkit.training.meter import Board, Meter
from labkit.training.runtime import Runtime
from labkit.training.trainer import Trainer
from labkit.workloads.base import Task
from labkit.workloads.seed import seed_generators

_LIBRARIES = tuple(
    str(Path(module.__file__ or "").parents[up]) + os.sep for module, up in ((labkit, 0), (torch, 1), (os, 0))
)
"""Where labkit, the installed packages and Python's own library lie."""
_KEPT: list[object] = []
"""Kept until the process ends without freeing anything: gloo's destructors now and then wait for ever (seen in 2 of 360
runs with many small buckets, torch 2.13), and the rank would stay behind after its last event.
"""


def main(
    *,
    directory: RunDirectory,
    experiment: Experiment,
    rank: int,
    board: Board,
    rendezvous: str,
    requested: float,
    resume: str | None = None,
    train: bool = True,
) -> None:
    """Train as one rank. Raises what went wrong; SystemExit(EXIT_STOPPED) when it was stopped before its end.

    With `train` False everything is made ready, which rehearses the task, and nothing is trained.
    """
    # On this signal the stacks of all threads go to the log, also while the main thread hangs in a collective.
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    # Their new names are not there before torch 2.13, and a log is no place to say so to a learner.
    renamed = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", renamed, FutureWarning)
    events = EventWriter(directory.events(rank), rank)
    try:
        with Meter(events, rank, board, requested) as meter:
            runtime = Runtime.start(experiment, rank, rendezvous)
            meter.use(runtime.device)
            workload = registry("workload")[experiment.workload.name].load()
            options = workload.Options(**experiment.workload.options)
            seed_generators(experiment.training.seed)  # also for what a person's file draws when it is read
            task = _build(workload, options, experiment.training.seed)
            with _refusals():
                trainer = Trainer(experiment, directory, task, runtime, meter, board, resume)
            stopped = trainer.run() if train else False
            if not train:
                meter.phase("done")
        events.write("end", step=trainer.done, reason="stopped" if stopped else "finished")
        events.sync()
        runtime.end()
        _KEPT.append((trainer, runtime))
    except BaseException as error:
        if not isinstance(error, SystemExit):
            _write_error(events, error)
        raise
    if stopped:
        raise SystemExit(EXIT_STOPPED)


def rehearse(**order: Any) -> None:
    """The entry of a rank that only rehearses (`labkit validate --rehearse`)."""
    main(**order, train=False)


def _build(workload: Any, options: Any, seed: int) -> Task:
    """The task as the workload builds it; TaskFault with one sentence for whatever is wrong about it."""
    try:
        task: Task = workload.build(options, seed)
    except TaskFault:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT, EFBIG):
            raise  # the disk is at fault, not the task
        raise TaskFault(_why_not_built(error)) from error
    return task


@contextmanager
def _refusals() -> Iterator[None]:
    """What labkit itself refuses of a task while a rank is set up (ValueError) is a request gone wrong (TaskFault)."""
    try:
        yield
    except TaskFault:
        raise
    except ValueError as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        if not raised_in.startswith(_LIBRARIES[0]) or "checkpoint" in str(error):
            raise
        raise TaskFault(error) from error


def _why_not_built(error: BaseException) -> str:
    """One sentence: what labkit's own rules say of it, or what was raised in whose file and line."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [frame for frame in frames if not frame.filename.startswith((*_LIBRARIES, "<frozen"))]
    if not places:
        return str(error) if isinstance(error, ValueError) else f"the workload cannot be built: {named(error)}"
    own = places[-1]
    return f"{own.name} raised {named(error)} ({os.path.basename(own.filename)}, line {own.lineno})"


def _write_error(events: EventWriter, error: BaseException) -> None:
    """For the reader of the events; the supervisor hears of it through its pipe."""
    trace = "".join(traceback.format_exception(error))[-16_000:]
    try:
        events.write("error", type=type(error).__name__, message=message_of(error)[:4000], traceback=trace)
    except OSError:
        print(trace, file=sys.stderr, flush=True)  # noqa: T201  (the log of the rank)
