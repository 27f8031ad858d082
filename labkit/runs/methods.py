"""What a reader of runs has to know of the method by which their ranks combined what they learned."""

from __future__ import annotations

from labkit.experiment import Experiment

PLAIN, SYNCHRONOUS = "none", "synchronous"


def is_plain(experiment: Experiment | None) -> bool:
    """Did every update use the mean of uncompressed gradients? So trains what other methods are compared with."""
    if experiment is None:
        return False
    gradients = experiment.gradients
    return gradients.compression.method == PLAIN and gradients.update.method == SYNCHRONOUS


def period(experiment: Experiment | None) -> int:
    """Updates after which work repeats itself: H for methods whose ranks meet once in H updates, else 1.

    Times and bytes of single steps tell nothing there: most steps send nothing. Over H steps they do.
    """
    if experiment is None:
        return 1
    every = experiment.gradients.update.options.get("every", 1)
    return every if isinstance(every, int) and every > 0 else 1


def key(experiment: Experiment) -> str:
    """The method in the words of the settings: `plain`, `powersgd`, `diloco`; joined by + where both are chosen."""
    gradients = experiment.gradients
    chosen = [gradients.compression.method, gradients.update.method]
    return (
        " + ".join(name for name, usual in zip(chosen, (PLAIN, SYNCHRONOUS), strict=True) if name != usual) or "plain"
    )
