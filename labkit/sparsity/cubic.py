"""A network that gets sparser along a cubic (Zhu & Gupta 2017, arXiv:1710.01878).

After a part t of the time between `at` and `end`, the part s·(1 - (1 - t)³) of the target is reached: many weights go
early, while the network can still make up for them, few at the end. What is gone does not come back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from labkit.experiment.problem import OptionError
from labkit.sparsity.method import Options as CommonOptions
from labkit.sparsity.method import Sparsifier, one_topology

if TYPE_CHECKING:
    from collections.abc import Iterator

    from labkit.experiment import Experiment
    from labkit.experiment.machine import Machine
    from labkit.experiment.problem import Problem
    from labkit.sparsity.method import SparsityContext


class Cubic(Sparsifier):
    """Base of the methods that cut many times."""

    class Options(CommonOptions):
        at: float = Field(default=0.1, ge=0, lt=1)
        """Part of the training after which cutting begins."""
        end: float = Field(default=0.7, gt=0, le=1)
        """Part of the training after which the network is as sparse as it gets."""
        every: int | None = Field(default=None, ge=1, le=1_000_000)
        """Updates between two cuts; empty: a hundredth of the training."""

        @model_validator(mode="after")
        def _in_order(self) -> Cubic.Options:
            if self.at >= self.end:
                said = f"cutting begins after {self.at} of the training and cannot end at {self.end}"
                raise OptionError("end", said, 1.0)
            return self

    def __init__(self, setting: SparsityContext) -> None:
        super().__init__(setting)
        self._first = max(1, round(self.options.at * setting.steps))
        self._last = max(self._first, round(self.options.end * setting.steps))
        self._every = self.options.every or max(1, setting.steps // 100)

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Why it cannot run here."""
        yield from Sparsifier.problems(experiment, machine)
        yield from one_topology(experiment)

    def sparsity(self, step: int) -> float:
        """Part of the weights that is to be zero after `step` updates."""
        if step >= self._last:
            return float(self.target)
        done = (step - self._first) / (self._last - self._first)
        return float(self.target * (1 - (1 - done) ** 3)) if step >= self._first else 0.0

    def chooses(self, step: int) -> bool:
        """Every so often between begin and end, and at the end."""
        done = step + 1
        return self._first <= done <= self._last and ((done - self._first) % self._every == 0 or done == self._last)
