"""A random mask that never changes: the control that every method for choosing weights has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from labkit.sparsity.method import Options as CommonOptions
from labkit.sparsity.method import Sparsifier, masked_gradients

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from labkit.experiment import Experiment
    from labkit.experiment.machine import Machine
    from labkit.experiment.problem import Problem


class Static(Sparsifier):
    """Sparse from the first update on."""

    class Options(CommonOptions):
        distribution: Literal["uniform", "erk"] = "uniform"
        """How many weights each layer keeps: all the same part, or small layers more (Erdős–Rényi-kernel)."""

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Why it cannot run here."""
        yield from Sparsifier.problems(experiment, machine)
        yield from masked_gradients(experiment)

    def begin(self) -> None:
        """Draw the masks; the same on every rank."""
        self.churn = self.masks.set(self._drawn())

    def _drawn(self) -> dict[str, Tensor]:
        from labkit.sparsity.choose import any_of
        from labkit.sparsity.distribution import kept

        counts = kept(self.setting.shapes, self.target, self.options.distribution)
        numbers = {name: number for number, name in enumerate(self.setting.shapes)}
        return {
            name: any_of(tuple(weight.shape), counts[name], self.seed * 100_003 + numbers[name]).to(weight.device)
            for name, weight in self.masks.weights().items()
        }
