"""The base class of sparsity methods.

The trainer calls a method at the same points of an optimizer step as an update rule:

    forward and backward passes → before_update → optimizer → after_update

The file of a method imports torch only inside its methods, because forms read its options.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from labkit.experiment.after_training import first_rank_problems
from labkit.experiment.problem import Problem
from labkit.experiment.registry import Options as BaseOptions
from labkit.experiment.update_rule import update_rule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from labkit.experiment import Experiment
    from labkit.experiment.machine import Machine
    from labkit.sparsity.masks import Masks

MASK = "mask."
"""Prefix of the names of masks in a checkpoint."""
REACHED_WITHIN = 0.02
"""A sparsity counts as reached if it differs from its target by no more."""


class Options(BaseOptions):
    """Options of all methods."""

    ends: bool = False
    """Make the first and the last layer sparse too."""


@dataclass(frozen=True)
class SparsityContext:
    """Everything that a method needs on its rank."""

    experiment: Experiment
    options: Any
    """The options of the method."""
    masks: Masks
    shapes: dict[str, tuple[int, ...]]
    """Shapes of all weights that may become zero, in all stages, by name."""
    steps: int
    """Number of optimizer steps of the whole run."""
    layers: dict[str, Any]
    """Layers with sparse kernels (see `prepare`), by the name of the weight."""
    units: list[Any]
    """Groups of weights that are kept or pruned together."""


class Sparsifier:
    """Base class of methods, which choose new masks in certain steps."""

    Options: type[BaseOptions] = Options
    kernel = "csr"
    """Kind of kernel of the layers that `prepare` creates."""
    sparse_products: tuple[bool, bool, bool] = (True, True, True)
    """Which products of a layer could skip zeros: forward, gradient of the inputs, gradient of the weight."""
    uses_gradients = False
    """Whether the choice depends on gradients of weights that are zero."""

    def __init__(self, context: SparsityContext) -> None:
        self.context, self.options, self.masks = context, context.options, context.masks
        if not context.shapes and context.experiment.sparsity.method != "none":
            raise ValueError("this model has no weights that could become zero (sparsity.method)")
        self.target = context.experiment.sparsity.target
        self.seed = context.experiment.training.seed
        self.churn: dict[str, float] | None = None
        """Fraction of the kept weights that the last change added, by name; None if none came since it was taken."""
        self._gradients: dict[str, Tensor] = {}

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield the reasons why it cannot run here."""
        yield from target_problems(experiment)
        yield from export_problems(experiment)

    @staticmethod
    def shapes(model: nn.Module, options: Any) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of the weights that may become zero, in the full model before it is parallelized."""
        from labkit.sparsity.layers import prunable

        return prunable(model, options.ends)

    @staticmethod
    def units(model: nn.Module) -> list[Any]:
        """Return groups of weights that are kept or pruned together, in the full model before it is parallelized."""
        return []

    @staticmethod
    def prepare(
        model: nn.Module,
        experiment: Experiment,
        options: Any,
        shapes: dict[str, tuple[int, ...]],
        sample: Callable[[], Tensor],
    ) -> dict[str, Any]:
        """Replace layers of the full model by ones with sparse kernels, before it is parallelized (collective).

        `sample` returns an input of one sample. Returns the new layers by the names of their weights.
        """
        return {}

    def notes(self) -> list[str]:
        """Return sentences that a user should read before the training begins, e.g. about a target out of reach."""
        return []

    def begin(self) -> None:
        """Do what is due before the first optimizer step of a new run (not of a resumed one)."""

    def changes_masks(self, step: int) -> bool:
        """Return whether new masks are chosen after optimizer step `step` (counted from 0)."""
        return False

    def choose_masks(self, step: int, weights: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return masks for this rank's stages, chosen from full weights and, if used, gradients; here the old ones."""
        return self.masks.full_masks

    def effective_weights(self, step: int | None = None) -> AbstractContextManager[None]:
        """Return a context manager in which the model holds the weights that the network uses.

        It is used around each pass of optimizer step `step` and, with None, around an evaluation.
        """
        if step is not None and self.uses_gradients and self.changes_masks(step):
            for layer in self.context.layers.values():
                layer.record_dense_gradient()
        return nullcontext()

    def before_update(self, step: int) -> None:
        """Mask the gradients before the optimizer; gather full ones first if they are needed for new masks."""
        if self.uses_gradients and self.changes_masks(step):
            self._gradients = self.masks.gradients()
            for name, layer in self.context.layers.items():
                self._gradients[name] = self.masks.average_over_replicas(layer.pop_dense_gradient())
        self.masks.mask_gradients()

    def after_update(self, step: int) -> None:
        """Choose new masks after the optimizer, if it is time."""
        if self.changes_masks(step):
            self.churn = self.masks.set(self.choose_masks(step, self.masks.weights(), self._gradients))
            self._gradients = {}

    def take_churn(self) -> dict[str, float] | None:
        """Return `churn` and reset it to None."""
        churn, self.churn = self.churn, None
        return churn

    def statistics(self) -> dict[str, Any]:
        """Return what was counted during the run besides zeros, for the summary."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Return the masks of all stages for a checkpoint (collective along pp)."""
        masks = {MASK + name: mask.cpu() for name, mask in self.masks.full_masks.items()}
        return self.masks.gather_named(masks)

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore the masks from a checkpoint, if it has any."""
        masks = {name.removeprefix(MASK): mask for name, mask in state.items() if name.startswith(MASK)}
        if masks:
            self.masks.restore(masks)


def target_problems(experiment: Experiment) -> Iterator[Problem]:
    """Yield a problem if a method has no target."""
    if experiment.sparsity.target == 0:
        reason = f"{experiment.sparsity.method} needs to know which fraction of the weights should become zero"
        yield Problem("sparsity.target", reason, 0.9)


def export_problems(experiment: Experiment) -> Iterator[Problem]:
    """Yield the reasons why the trained network cannot be exported in its fastest form."""
    if experiment.sparsity.export:
        yield from first_rank_problems(experiment, "sparsity.export", "false", "exports", "exported")
        if experiment.quantization.qat != "none":
            reason = (
                "a network trained for rounding would be exported without it: convert it (quantization.after_training)"
            )
            yield Problem("sparsity.export", reason, False)


def synchronous_only(experiment: Experiment) -> Iterator[Problem]:
    """Yield a problem if ranks hold different weights, from which they would choose different masks."""
    update = update_rule(experiment)
    if not update.is_synchronous:
        reason = f"{update.key} lets ranks hold different weights, from which they would choose different masks"
        yield Problem("sparsity.method", reason, "static")


def masked_gradient_problems(experiment: Experiment) -> Iterator[Problem]:
    """Yield a problem if the update rule calls the optimizer itself, with unmasked gradients."""
    update = update_rule(experiment)
    rule, _ = update.load()
    if not rule.masks_reach_optimizer:
        reason = f"under {update.key} gradients reach the optimizer unmasked, so zero weights would not stay zero"
        yield Problem(update.field, reason, update.nearest_synchronous)
