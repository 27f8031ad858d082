"""Run an experiment to its end, in one call; whatever breaks off the wait ends the run too."""

from __future__ import annotations

from labkit.experiment import Experiment
from labkit.launch.client import launch
from labkit.runs.interrupts import as_interrupts
from labkit.runs.run import Run

__all__ = ["finished"]


def finished(experiment: Experiment) -> Run:
    """Launch and wait; RunFailed if it did not end well. An interrupt asks it to stop and does not wait for that."""
    with as_interrupts():
        run = launch(experiment, baseline=None)
        try:
            run.result()
        except KeyboardInterrupt:
            run.request_stop(0.0)
            raise
        return run
