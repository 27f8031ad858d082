"""When a run evaluates and saves: every so many optimizer steps, and at the end."""

from __future__ import annotations

from labkit.experiment import Experiment

DEFAULT_EVALUATIONS = 10
"""Number of evaluations of a run that does not set their interval."""


class Intervals:
    """The intervals between evaluations and between checkpoints, in optimizer steps; 0 switches them off."""

    def __init__(self, experiment: Experiment, steps: int) -> None:
        training = experiment.training
        self._steps = steps
        evaluate, save = training.evaluate_every, training.checkpoint_every
        self._evaluate = max(1, steps // DEFAULT_EVALUATIONS) if evaluate is None else evaluate
        self._save = steps if save is None else save

    def evaluates(self, step: int) -> bool:
        """Return True if an evaluation is due after `step` steps."""
        return self._due(step, self._evaluate)

    def saves(self, step: int) -> bool:
        """Return True if a checkpoint is due after `step` steps."""
        return self._due(step, self._save)

    def next_due(self, step: int) -> int:
        """Return the first step count above `step` at which an evaluation or checkpoint is due, at most the end."""
        intervals = [interval for interval in (self._evaluate, self._save) if interval > 0]
        return min([self._steps, *((step // interval + 1) * interval for interval in intervals)])

    def _due(self, step: int, every: int) -> bool:
        return every > 0 and (step % every == 0 or step == self._steps)
