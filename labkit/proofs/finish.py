"""Run an experiment to its end in one call; whatever interrupts the wait also ends the run."""

from __future__ import annotations

from labkit.experiment import Experiment
from labkit.launch.client import launch
from labkit.runs.interrupts import as_interrupts
from labkit.runs.run import Run

__all__ = ["run_to_completion"]


def run_to_completion(experiment: Experiment) -> Run:
    """Launch a run, wait for it and return it. RunFailed if it failed; an interrupt stops it without waiting."""
    with as_interrupts():
        run = launch(experiment, baseline=None)
        try:
            run.result()
        except KeyboardInterrupt:
            run.request_stop(0.0)
            raise
        return run
