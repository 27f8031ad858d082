"""The same training in a single process: the reference of speed-ups and parity checks."""

from __future__ import annotations

from labkit.experiment.layout import Layout
from labkit.experiment.schema import Experiment
from labkit.experiment.sections import Gradients

MAX_NAME = 200


def one_process(experiment: Experiment, name: str = "") -> Experiment:
    """Return `experiment` on one rank and in one pass per step, with plain gradients and another name."""
    return experiment.set(
        {
            "layout": Layout(),
            "gradients": Gradients(),
            "launch.isolated": False,
            "launch.network": None,
            "launch.slowdown": {},
            "name": name[:MAX_NAME],
        }
    )


def is_one_process(experiment: Experiment) -> bool:
    """Return True if one process computes the whole batch in one pass at its own speed.

    Any other baseline would flatter the run that is compared with it.
    """
    alone = experiment.layout.world_size == 1 and experiment.gradients.accumulation == 1
    return alone and not experiment.launch.slowdown
