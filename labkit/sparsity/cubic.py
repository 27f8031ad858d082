"""Sparsity that grows along a cubic (Zhu & Gupta 2017, arXiv:1710.01878).

After a fraction t of the time between `at` and `end`, the sparsity is s·(1 - (1 - t)³) for the target s: many weights
are pruned early, while the network can still recover, and few at the end. Pruned weights do not come back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from labkit.experiment.problem import OptionError
from labkit.sparsity.method import Options as CommonOptions
from labkit.sparsity.method import Sparsifier, synchronous_only

if TYPE_CHECKING:
    from collections.abc import Iterator

    from labkit.experiment import Experiment
    from labkit.experiment.machine import Machine
    from labkit.experiment.problem import Problem
    from labkit.sparsity.method import SparsityContext


class Cubic(Sparsifier):
    """Base class of methods that prune in many small cuts."""

    class Options(CommonOptions):
        at: float = Field(default=0.1, ge=0, lt=1)
        """Fraction of the training after which pruning starts."""
        end: float = Field(default=0.7, gt=0, le=1)
        """Fraction of the training after which the target is reached."""
        every: int | None = Field(default=None, ge=1, le=1_000_000)
        """Optimizer steps between two pruning steps; empty: a hundredth of the training."""

        @model_validator(mode="after")
        def _in_order(self) -> Cubic.Options:
            if self.at >= self.end:
                reason = f"pruning starts after {self.at} of the training and cannot end at {self.end}"
                raise OptionError("end", reason, 1.0)
            return self

    def __init__(self, context: SparsityContext) -> None:
        super().__init__(context)
        self._first = max(1, round(self.options.at * context.steps))
        self._last = max(self._first, round(self.options.end * context.steps))
        self._every = self.options.every or max(1, context.steps // 100)

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield the reasons why it cannot run here."""
        yield from Sparsifier.problems(experiment, machine)
        yield from synchronous_only(experiment)

    def sparsity(self, step: int) -> float:
        """Return the fraction of the weights that is to be zero after `step` optimizer steps."""
        if step >= self._last:
            return float(self.target)
        done = (step - self._first) / (self._last - self._first)
        return float(self.target * (1 - (1 - done) ** 3)) if step >= self._first else 0.0

    def changes_masks(self, step: int) -> bool:
        """Every so often between begin and end, and at the end."""
        done = step + 1
        return self._first <= done <= self._last and ((done - self._first) % self._every == 0 or done == self._last)
