"""How the method by which ranks combine gradients or weights affects the reading of a run."""

from __future__ import annotations

from labkit.experiment import Experiment
from labkit.experiment.update_rule import SYNCHRONOUS, update_rule

PLAIN = "none"


def is_plain(experiment: Experiment | None) -> bool:
    """Return whether every step used the mean of uncompressed gradients: the method that others are compared with."""
    if experiment is None:
        return False
    return experiment.gradients.compression.method == PLAIN and update_rule(experiment).is_synchronous


def period(experiment: Experiment | None) -> int:
    """Return after how many steps work repeats: H for methods whose ranks synchronise once in H steps, else 1.

    With such a method most steps send nothing, so times and bytes mean something only over H steps.
    """
    if experiment is None:
        return 1
    steps = experiment.gradients.update.options.get("every", 1)
    return steps if isinstance(steps, int) and steps > 0 else 1


def key(experiment: Experiment) -> str:
    """Return the method as in the settings: `plain`, `powersgd`, `diloco`; compression and update rule joined by +."""
    methods = [experiment.gradients.compression.method, update_rule(experiment).key]
    return (
        " + ".join(name for name, default in zip(methods, (PLAIN, SYNCHRONOUS), strict=True) if name != default)
        or "plain"
    )
