"""A random mask that never changes: the control that every method for choosing weights has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from labkit.experiment.problem import Problem
from labkit.sparsity.method import Options as CommonOptions
from labkit.sparsity.method import Sparsifier, masked_gradients

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from labkit.experiment import Experiment
    from labkit.experiment.machine import Machine
    from labkit.sparsity.csr import CsrLinear


class Static(Sparsifier):
    """Sparse from the first update on."""

    class Options(CommonOptions):
        distribution: Literal["uniform", "erk"] = "uniform"
        """How many weights each layer keeps: all the same part, or small layers more (Erdős–Rényi-kernel)."""
        kernel: Literal["dense", "csr", "auto"] = "dense"
        """What linear layers compute with: all weights; the non-zero ones (CPUs); or what is faster, layer by layer."""

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Why it cannot run here."""
        yield from Sparsifier.problems(experiment, machine)
        yield from masked_gradients(experiment)
        yield from kernel_problems(experiment)

    @staticmethod
    def prepare(
        model: nn.Module,
        experiment: Experiment,
        options: Any,
        shapes: dict[str, tuple[int, ...]],
        sample: Callable[[], Tensor],
    ) -> dict[str, CsrLinear]:
        """Layers whose kernels know the mask."""
        if options.kernel == "dense":
            return {}
        from labkit.sparsity import csr

        masks = drawn(shapes, experiment, options)
        if options.kernel == "auto":
            chosen = csr.faster(model, masks, sample(), experiment)
            masks = {name: mask for name, mask in masks.items() if name in chosen}
        return csr.replace(model, masks)

    def begin(self) -> None:
        """Draw the masks; the same on every rank."""
        masks = drawn(self.setting.shapes, self.setting.experiment, self.options)
        weights = self.masks.weights()
        self.churn = self.masks.set({name: masks[name].to(weight.device) for name, weight in weights.items()})


def drawn(shapes: dict[str, tuple[int, ...]], experiment: Experiment, options: Any) -> dict[str, Tensor]:
    """Masks at random, by name, on the CPU."""
    from labkit.sparsity.choose import any_of
    from labkit.sparsity.distribution import kept

    counts = kept(shapes, experiment.sparsity.target, options.distribution)
    seed = experiment.training.seed * 100_003
    return {name: any_of(shape, counts[name], seed + number) for number, (name, shape) in enumerate(shapes.items())}


def kernel_problems(experiment: Experiment) -> Iterator[Problem]:
    """Where layers cannot compute with their non-zero weights."""
    if experiment.sparsity.options["kernel"] == "dense":
        return
    layout, field = experiment.layout, "sparsity.kernel"
    if layout.world_size != layout.dp_replicate:
        yield Problem(field, "a layer that holds its non-zero weights only cannot be cut over ranks", "dense")
    if experiment.launch.device != "cpu":
        yield Problem(field, "torch's sparse products are faster than dense ones on CPUs only", "dense")
    if experiment.quantization.training not in ("fp32", "fp64") or experiment.quantization.qat != "none":
        yield Problem(field, "torch's sparse products know fp32 and fp64 only", "dense")
