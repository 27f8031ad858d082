"""The entry of one rank, called in a process that its supervisor has just forked."""

from __future__ import annotations

import faulthandler
import signal
import sys
import traceback
import warnings

from labkit.experiment import Experiment
from labkit.experiment.failures import message_of
from labkit.experiment.registry import registry
from labkit.experiment.run_directory import EXIT_STOPPED, RunDirectory
from labkit.training.events import EventWriter
from labkit.training.meter import Board, Meter
from labkit.training.runtime import Runtime
from labkit.training.trainer import Trainer

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
) -> None:
    """Train as one rank. Raises what went wrong; SystemExit(EXIT_STOPPED) when it was stopped before its end."""
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
            task = workload.build(options, experiment.training.seed)
            trainer = Trainer(experiment, directory, task, runtime, meter, board, resume)
            stopped = trainer.run()
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


def _write_error(events: EventWriter, error: BaseException) -> None:
    """For the reader of the events; the supervisor hears of it through its pipe."""
    trace = "".join(traceback.format_exception(error))[-16_000:]
    try:
        events.write("error", type=type(error).__name__, message=message_of(error)[:4000], traceback=trace)
    except OSError:
        print(trace, file=sys.stderr, flush=True)  # noqa: T201  (the log of the rank)
