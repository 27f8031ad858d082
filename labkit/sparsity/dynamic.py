"""Dynamic sparsity: as many weights at any time, others from time to time.

Every `every` updates each layer drops its smallest weights and grows as many elsewhere. The part that changes falls
along a cosine to zero at `until` of the training; from there on the topology stays. What grows starts from zero, with
no moments.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING

from pydantic import Field

from labkit.sparsity.method import Sparsifier, one_topology
from labkit.sparsity.static import Static, kernel_problems

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from labkit.experiment import Experiment
    from labkit.experiment.machine import Machine
    from labkit.experiment.problem import Problem


class Dynamic(Static):
    """Base of SET and RigL."""

    class Options(Static.Options):
        every: int | None = Field(default=None, ge=1, le=1_000_000)
        """Updates between two changes of the topology; empty: a fiftieth of the training, at most 100."""
        drop: float = Field(default=0.3, gt=0, le=1)
        """Part of a layer's weights that the first change replaces."""
        until: float = Field(default=0.75, gt=0, le=1)
        """Part of the training after which the topology stays."""

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Why it cannot run here."""
        yield from Sparsifier.problems(experiment, machine)
        yield from one_topology(experiment)
        yield from kernel_problems(experiment)

    @property
    def _every(self) -> int:
        return self.options.every or min(100, max(1, self.setting.steps // 50))

    def chooses(self, step: int) -> bool:
        """Every so often, until the topology stays."""
        return (step + 1) % self._every == 0 and step + 1 < self.options.until * self.setting.steps

    def choose(self, step: int, weights: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Drop and grow in every layer."""
        from labkit.sparsity.choose import drop_and_grow

        end = self.options.until * self.setting.steps
        part = self.options.drop / 2 * (1 + math.cos(math.pi * (step + 1) / end))
        numbers = {name: number for number, name in enumerate(self.setting.shapes)}
        chosen = {}
        for name, mask in self.masks.whole.items():
            growth = self.growth(name, numbers[name], step, gradients, weights[name])
            chosen[name] = drop_and_grow(mask, weights[name], growth, round(part * int(mask.sum())))
        return chosen

    @abstractmethod
    def growth(self, name: str, number: int, step: int, gradients: dict[str, Tensor], weight: Tensor) -> Tensor:
        """How much each weight of a layer should be there, of the weight's shape; `number` is the layer's."""
