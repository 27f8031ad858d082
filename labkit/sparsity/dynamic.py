"""Dynamic sparsity: the number of weights is constant, but which ones are kept changes from time to time.

Every `every` steps each layer drops its smallest weights and grows as many elsewhere. The fraction that changes falls
along a cosine to zero at `until` of the training; from there on the topology is fixed. New weights start from zero,
without moments.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING

from pydantic import Field

from labkit.sparsity.method import Sparsifier, synchronous_only
from labkit.sparsity.static import Static, kernel_problems

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from labkit.experiment import Experiment
    from labkit.experiment.machine import Machine
    from labkit.experiment.problem import Problem


class Dynamic(Static):
    """Base class of SET and RigL."""

    class Options(Static.Options):
        every: int | None = Field(default=None, ge=1, le=1_000_000)
        """Optimizer steps between two changes of the topology; empty: a fiftieth of the training, at most 100."""
        drop: float = Field(default=0.3, gt=0, le=1)
        """Fraction of a layer's weights that the first change replaces; later changes replace fewer."""
        until: float = Field(default=0.75, gt=0, le=1)
        """Fraction of the training after which the topology is fixed."""

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield the reasons why it cannot run here."""
        yield from Sparsifier.problems(experiment, machine)
        yield from synchronous_only(experiment)
        yield from kernel_problems(experiment)

    @property
    def _every(self) -> int:
        return self.options.every or min(100, max(1, self.context.steps // 50))

    def changes_masks(self, step: int) -> bool:
        """Return True every `every` steps until the topology is fixed."""
        return (step + 1) % self._every == 0 and step + 1 < self.options.until * self.context.steps

    def choose_masks(self, step: int, weights: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Drop and grow weights in every layer."""
        from labkit.sparsity.choose import drop_and_grow

        end = self.options.until * self.context.steps
        fraction = self.options.drop / 2 * (1 + math.cos(math.pi * (step + 1) / end))
        numbers = {name: layer_index for layer_index, name in enumerate(self.context.shapes)}
        chosen = {}
        for name, mask in self.masks.full_masks.items():
            growth = self.growth(name, numbers[name], step, gradients, weights[name])
            chosen[name] = drop_and_grow(mask, weights[name], growth, round(fraction * int(mask.sum())))
        return chosen

    @abstractmethod
    def growth(self, name: str, layer_index: int, step: int, gradients: dict[str, Tensor], weight: Tensor) -> Tensor:
        """Return a score for each weight of layer `layer_index`, in its shape; weights with the largest scores grow."""
