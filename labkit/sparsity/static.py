"""A random mask that never changes: the baseline that every method for choosing weights has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from labkit.experiment.problem import Problem
from labkit.sparsity.method import Options as CommonOptions
from labkit.sparsity.method import Sparsifier, masked_gradient_problems

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from labkit.experiment import Experiment
    from labkit.experiment.machine import Machine
    from labkit.sparsity.csr import CsrLinear


class Static(Sparsifier):
    """Trains with a random mask from the first step on."""

    class Options(CommonOptions):
        distribution: Literal["uniform", "erk"] = "uniform"
        """How many weights layers keep: the same fraction (uniform), or more in small ones (Erdős–Rényi-kernel)."""
        kernel: Literal["dense", "csr", "auto"] = "dense"
        """Kernel of linear layers: dense, csr with the non-zero weights (CPUs), or auto, the faster one for each."""

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield the reasons why it cannot run here."""
        yield from Sparsifier.problems(experiment, machine)
        yield from masked_gradient_problems(experiment)
        yield from kernel_problems(experiment)

    @staticmethod
    def prepare(
        model: nn.Module,
        experiment: Experiment,
        options: Any,
        shapes: dict[str, tuple[int, ...]],
        sample: Callable[[], Tensor],
    ) -> dict[str, CsrLinear]:
        """Replace linear layers by ones that compute with the non-zero weights only, and return them."""
        if options.kernel == "dense":
            return {}
        from labkit.sparsity import csr

        masks = draw_masks(shapes, experiment, options)
        if options.kernel == "auto":
            chosen = csr.faster_layers(model, masks, sample(), experiment)
            masks = {name: mask for name, mask in masks.items() if name in chosen}
        return csr.replace(model, masks)

    def begin(self) -> None:
        """Draw the masks, which are the same on every rank."""
        masks = draw_masks(self.context.shapes, self.context.experiment, self.options)
        weights = self.masks.weights()
        self.churn = self.masks.set({name: masks[name].to(weight.device) for name, weight in weights.items()})


def draw_masks(shapes: dict[str, tuple[int, ...]], experiment: Experiment, options: Any) -> dict[str, Tensor]:
    """Draw random masks on the CPU, by name."""
    from labkit.sparsity.choose import random_mask
    from labkit.sparsity.distribution import kept_counts

    counts = kept_counts(shapes, experiment.sparsity.target, options.distribution)
    seed = experiment.training.seed * 100_003
    return {name: random_mask(shape, counts[name], seed + index) for index, (name, shape) in enumerate(shapes.items())}


def kernel_problems(experiment: Experiment) -> Iterator[Problem]:
    """Yield the reasons why layers cannot compute with their non-zero weights only."""
    if experiment.sparsity.options["kernel"] == "dense":
        return
    layout, field = experiment.layout, "sparsity.kernel"
    if layout.world_size != layout.dp_replicate:
        yield Problem(field, "a layer that stores its non-zero weights only cannot be sharded over ranks", "dense")
    if experiment.launch.device != "cpu":
        yield Problem(field, "torch's sparse products are faster than dense ones on CPUs only", "dense")
    if experiment.quantization.training not in ("fp32", "fp64") or experiment.quantization.qat != "none":
        yield Problem(field, "torch's sparse products support fp32 and fp64 only", "dense")
