"""What every sparsity method is made of.

The trainer tells it of the same moments of an update as an update rule:

    passes forward and backward → before_update → optimizer → after_update

A method's file imports torch inside its methods only: forms read its options.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from labkit.experiment.after_training import on_the_first_rank
from labkit.experiment.problem import Problem
from labkit.experiment.registry import Options as BaseOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from labkit.experiment import Experiment
    from labkit.experiment.machine import Machine
    from labkit.sparsity.masks import Masks

MASK = "mask."
"""Before the names of masks in a checkpoint."""
REACHED_WITHIN = 0.02
"""A sparsity counts as reached if it differs from its target by no more."""


class Options(BaseOptions):
    """What all methods have in common."""

    ends: bool = False
    """Make the first and the last layer sparse too."""


@dataclass(frozen=True)
class SparsityContext:
    """What a method works with on its rank."""

    experiment: Experiment
    options: Any
    """Those of the method."""
    masks: Masks
    shapes: dict[str, tuple[int, ...]]
    """Of all weights that may become zero, in all stages, by name."""
    steps: int
    """Updates of the whole run."""
    layers: dict[str, Any]
    """Those with kernels of their own (`prepare`), by the name of the weight."""
    units: list[Any]
    """Groups of weights that come or go together."""


class Sparsifier:
    """Base of the methods: a mask that is chosen now and then."""

    Options: type[BaseOptions] = Options
    kernel = "csr"
    """What the layers that `prepare` makes compute with."""
    sparse_products: tuple[bool, bool, bool] = (True, True, True)
    """In theory, which products of a layer leave zeros out: forward, for the gradient of the inputs, of the weight."""
    uses_gradients = False
    """Does it look at gradients of weights that are zero?"""

    def __init__(self, setting: SparsityContext) -> None:
        self.setting, self.options, self.masks = setting, setting.options, setting.masks
        if not setting.shapes and setting.experiment.sparsity.method != "none":
            raise ValueError("this model has no weights that could become zero (sparsity.method)")
        self.target = setting.experiment.sparsity.target
        self.seed = setting.experiment.training.seed
        self.churn: dict[str, float] | None = None
        """What part of the kept weights came new in the last change, by name; None if nothing changed since asked."""
        self._gradients: dict[str, Tensor] = {}

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Why it cannot run here."""
        yield from without_target(experiment)
        yield from exportable(experiment)

    @staticmethod
    def shapes(model: nn.Module, options: Any) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights that may become zero, of the whole network before a layout is applied."""
        from labkit.sparsity.layers import prunable

        return prunable(model, options.ends)

    @staticmethod
    def units(model: nn.Module) -> list[Any]:
        """Groups of weights that come or go together, of the whole network before a layout is applied."""
        return []

    @staticmethod
    def prepare(
        model: nn.Module,
        experiment: Experiment,
        options: Any,
        shapes: dict[str, tuple[int, ...]],
        sample: Callable[[], Tensor],
    ) -> dict[str, Any]:
        """Put layers with other kernels into the whole network, before a layout is applied (collective).

        `sample` gives an input of one sample. Returns these layers by the names of their weights.
        """
        return {}

    def notes(self) -> list[str]:
        """What a person should know before the training begins, one sentence each, e.g. a target out of reach."""
        return []

    def begin(self) -> None:
        """Before the first update of a new run."""

    def chooses(self, step: int) -> bool:
        """Is another mask chosen after update `step` (counted from 0)?"""
        return False

    def choose(self, step: int, weights: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """The masks from here on, of this rank's stages, from whole weights (and their gradients): the same ones."""
        return self.masks.whole

    def passes(self, step: int | None = None) -> AbstractContextManager[None]:
        """Around each pass of update `step`, and around an evaluation: the weights are those that the network uses."""
        if step is not None and self.uses_gradients and self.chooses(step):
            for layer in self.setting.layers.values():
                layer.watch()
        return nullcontext()

    def before_update(self, step: int) -> None:
        """The gradients are there; the optimizer comes next."""
        if self.uses_gradients and self.chooses(step):
            self._gradients = self.masks.gradients()
            for name, layer in self.setting.layers.items():
                self._gradients[name] = self.masks.averaged(layer.watched())
        self.masks.mask_gradients()

    def after_update(self, step: int) -> None:
        """The optimizer has stepped."""
        if self.chooses(step):
            self.churn = self.masks.set(self.choose(step, self.masks.weights(), self._gradients))
            self._gradients = {}

    def take_churn(self) -> dict[str, float] | None:
        """What the last change brought, once."""
        churn, self.churn = self.churn, None
        return churn

    def found(self) -> dict[str, Any]:
        """What was really in force, counted, beside the zeros."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs, the masks of all stages (collective along pp)."""
        own = {MASK + name: mask.cpu() for name, mask in self.masks.whole.items()}
        return self.masks.together(own)

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint."""
        masks = {name.removeprefix(MASK): mask for name, mask in state.items() if name.startswith(MASK)}
        if masks:
            self.masks.restore(masks)


def without_target(experiment: Experiment) -> Iterator[Problem]:
    """A method that makes nothing zero."""
    if experiment.sparsity.target == 0:
        said = f"{experiment.sparsity.method} needs to know which part of the weights shall be zero"
        yield Problem("sparsity.target", said, 0.9)


def exportable(experiment: Experiment) -> Iterator[Problem]:
    """Where the trained network cannot be put in its fastest form."""
    if experiment.sparsity.export:
        yield from on_the_first_rank(experiment, "sparsity.export", "false", "exports", "exported")
        if experiment.quantization.qat != "none":
            said = (
                "a network trained for rounding would be exported without it: convert it (quantization.after_training)"
            )
            yield Problem("sparsity.export", said, False)


def one_topology(experiment: Experiment) -> Iterator[Problem]:
    """Where masks cannot change: those that follow from weights and gradients are equal where those are equal."""
    update = experiment.gradients.update.method
    if update != "synchronous":
        said = f"{update} lets ranks hold different weights, from which they would choose different masks"
        yield Problem("sparsity.method", said, "static")


IN_ROUNDS = ("synchronous", "local_sgd", "post_local_sgd", "diloco", "streaming_diloco", "delayed")


def masked_gradients(experiment: Experiment) -> Iterator[Problem]:
    """Where a rule gives gradients to the optimizer by itself, nobody masks them."""
    update = experiment.gradients.update.method
    if update not in IN_ROUNDS:
        said = f"under {update} gradients reach the optimizer unmasked, and what is zero would not stay so"
        yield Problem("gradients.update.method", said, "synchronous")
