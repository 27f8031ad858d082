"""One-shot magnitude pruning: the smallest weights are pruned once, the others train on (Han et al. 2015)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from labkit.sparsity.method import Options as CommonOptions
from labkit.sparsity.method import Sparsifier, synchronous_only

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from labkit.experiment import Experiment
    from labkit.experiment.machine import Machine
    from labkit.experiment.problem import Problem
    from labkit.sparsity.masks import Masks


class Magnitude(Sparsifier):
    """Prunes the smallest weights once."""

    class Options(CommonOptions):
        scope: Literal["global", "layer"] = "global"
        """Whether weights are compared over the whole network or within each layer."""
        at: float = Field(default=0.5, ge=0, lt=1)
        """Fraction of the training after which the weights are pruned."""

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield the reasons why it cannot run here."""
        yield from Sparsifier.problems(experiment, machine)
        yield from synchronous_only(experiment)

    def changes_masks(self, step: int) -> bool:
        """Return True for the step of the cut."""
        return step + 1 == max(1, round(self.options.at * self.context.steps))

    def choose_masks(self, step: int, weights: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keep the largest weights."""
        return keep_largest(weights, self.target, self.options.scope, self.masks)


def number_kept(count: int, sparsity: float) -> int:
    """Return how many of `count` weights or blocks stay: at least one, since a layer of zeros passes nothing on."""
    return max(1, round((1 - sparsity) * count))


def keep_largest(scores: dict[str, Tensor], sparsity: float, scope: str, masks: Masks) -> dict[str, Tensor]:
    """Return masks without the fraction `sparsity` of the smallest scores, over all layers or (`scope`) within each.

    Over all layers means those of all pipeline stages (collective along pp).
    """
    from labkit.sparsity.choose import mask_of_largest

    sizes = {name: score.numel() for name, score in scores.items()}
    if scope == "layer":
        return {
            name: mask_of_largest(score.abs(), number_kept(sizes[name], sparsity)) for name, score in scores.items()
        }
    row, begin = masks.gather_stages({name: value.abs() for name, value in scores.items()})
    mask = mask_of_largest(row, number_kept(len(row), sparsity))
    parts = mask[begin : begin + sum(sizes.values())].split(list(sizes.values()))
    return {name: part.view(scores[name].shape) for name, part in zip(scores, parts, strict=True)}
