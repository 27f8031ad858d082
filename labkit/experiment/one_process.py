"""The same training by one process: what speed-ups and parity refer to."""

from __future__ import annotations

from labkit.experiment.layout import Layout
from labkit.experiment.schema import Experiment, Gradients

MAX_NAME = 200


def one_process(experiment: Experiment, name: str = "") -> Experiment:
    """`experiment` on one rank and in one pass, with plain gradients, under another name."""
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
    """Does one process compute the whole batch in one pass, at its own speed? Any other baseline would flatter."""
    alone = experiment.layout.world_size == 1 and experiment.gradients.accumulation == 1
    return alone and not experiment.launch.slowdown
