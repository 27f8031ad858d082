"""Magnitude pruning, once: the smallest weights of a trained network go, the others train on (Han et al. 2015)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from labkit.sparsity.method import Options as CommonOptions
from labkit.sparsity.method import Sparsifier, one_topology

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from labkit.experiment import Experiment
    from labkit.experiment.machine import Machine
    from labkit.experiment.problem import Problem
    from labkit.sparsity.masks import Masks


class Magnitude(Sparsifier):
    """One cut."""

    class Options(CommonOptions):
        scope: Literal["global", "layer"] = "global"
        """Compare all weights of the network, or those of a layer only."""
        at: float = Field(default=0.5, ge=0, lt=1)
        """Part of the training after which the weights are cut."""

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Why it cannot run here."""
        yield from Sparsifier.problems(experiment, machine)
        yield from one_topology(experiment)

    def chooses(self, step: int) -> bool:
        """Once."""
        return step + 1 == max(1, round(self.options.at * self.setting.steps))

    def choose(self, step: int, weights: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keep the largest."""
        return keep_largest(weights, self.target, self.options.scope, self.masks)


def kept_of(count: int, sparsity: float) -> int:
    """Return how many of `count` weights or blocks stay: at least one, since a layer of zeros passes nothing on."""
    return max(1, round((1 - sparsity) * count))


def keep_largest(scores: dict[str, Tensor], sparsity: float, scope: str, masks: Masks) -> dict[str, Tensor]:
    """Masks that leave out the part `sparsity` of the smallest scores, of all layers (of all stages) or of each."""
    from labkit.sparsity.choose import largest

    sizes = {name: score.numel() for name, score in scores.items()}
    if scope == "layer":
        return {name: largest(score.abs(), kept_of(sizes[name], sparsity)) for name, score in scores.items()}
    row, begin = masks.in_a_row({name: value.abs() for name, value in scores.items()})
    mask = largest(row, kept_of(len(row), sparsity))
    parts = mask[begin : begin + sum(sizes.values())].split(list(sizes.values()))
    return {name: part.view(scores[name].shape) for name, part in zip(scores, parts, strict=True)}
