"""Entry point of one rank, called in a process that its supervisor has just forked."""

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
from labkit.experiment.fault import TaskFault, describe_error
from labkit.experiment.own_code import load_own_methods
from labkit.experiment.run_directory import EXIT_STOPPED, RunDirectory
from labkit.training.events import EventWriter
from labkit.training.meter import Board, Meter
from labkit.training.runtime import Runtime
from labkit.training.trainer import Trainer
from labkit.workloads.base import Task
from labkit.workloads.mapped import mapped_files, mapped_parameters, pages_dropped
from labkit.workloads.seed import seed_generators

_LIBRARIES = tuple(
    str(Path(module.__file__ or "").parents[up]) + os.sep for module, up in ((labkit, 0), (torch, 1), (os, 0))
)
"""Folders of labkit, the installed packages and Python's standard library."""
_KEPT: list[object] = []
"""Objects that are never freed: gloo's destructors sometimes wait forever (seen in 2 of 360 runs with many small
buckets, torch 2.13), and the rank would hang after its last event.
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
    """Train as one rank; raise any error, and SystemExit(EXIT_STOPPED) if the run was stopped before its end.

    If `train` is False, set everything up, which rehearses the task, and do not train.
    """
    # On this signal the stacks of all threads are written to the log, even if the main thread hangs in a collective.
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    # Their new names do not exist before torch 2.13, and the warning would only confuse a learner who reads the log.
    renamed = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", renamed, FutureWarning)
    events = EventWriter(directory.events(rank), rank)
    try:
        with Meter(events, rank, board, requested) as meter:
            with _refusals():
                experiment = load_own_methods(experiment)
            runtime = Runtime.start(experiment, rank, rendezvous)
            meter.set_device(runtime.device)
            workload, options = experiment.workload.load()
            seed_generators(experiment.training.seed)  # also for random numbers that a user's file draws on import
            files = mapped_files(experiment.layout, directory.path)
            with pages_dropped(files):
                with mapped_parameters(files):
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


def rehearse(**arguments: Any) -> None:
    """Set up one rank and rehearse the task without training (`labkit validate --rehearse`); see `main`."""
    main(**arguments, train=False)


def _build(workload: Any, options: Any, seed: int) -> Task:
    """Return the task that the workload builds; raise TaskFault with one sentence if that fails."""
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
    """Turn a ValueError that labkit raises during set-up, other than for checkpoints, into a TaskFault."""
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
    """Return one sentence: the message of labkit's own rule, or the error with the user's file and line."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [frame for frame in frames if not frame.filename.startswith((*_LIBRARIES, "<frozen"))]
    if not places:
        return str(error) if isinstance(error, ValueError) else f"the workload cannot be built: {describe_error(error)}"
    own = places[-1]
    return f"{own.name} raised {describe_error(error)} ({os.path.basename(own.filename)}, line {own.lineno})"


def _write_error(events: EventWriter, error: BaseException) -> None:
    """Write the error as an event; the supervisor learns of it through its pipe."""
    trace = "".join(traceback.format_exception(error))[-16_000:]
    try:
        events.write("error", type=type(error).__name__, message=message_of(error)[:4000], traceback=trace)
    except OSError:
        print(trace, file=sys.stderr, flush=True)  # noqa: T201  (the log of the rank)
