"""N:M sparsity: of every M consecutive weights along a layer's inputs, N are used (GPUs have kernels for 2:4).

Trained from scratch with SR-STE (Zhou et al., ICLR 2021, arXiv:2102.04010): the weights stay dense; forward and
backward passes use the N largest of every M, a straight-through estimator gives a gradient to all of them, and unused
weights decay towards zero, so that the choice settles: the fraction of it that flips from one step to the next has to
fall. After the last step unused weights are zero.

Zeros are multiplied like other numbers; with `sparsity.kernel=semi_structured`, on GPUs that have kernels for 2:4, the
forward products skip them (two_four.py). There is no target: N/M determines how many weights stay.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from labkit.experiment.problem import OptionError, Problem
from labkit.sparsity import semi_structured
from labkit.sparsity.method import Options as CommonOptions
from labkit.sparsity.method import Sparsifier, export_problems, synchronous_only

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from labkit.experiment import Experiment
    from labkit.experiment.machine import Machine
    from labkit.sparsity.method import SparsityContext

COMPARED = 8
"""Largest group whose weights are ranked by comparing all pairs on GPUs."""
LOOKS = 100
"""How often in a run the choice is compared with that of the step before."""


class NM(Sparsifier):
    """SR-STE: uses the N largest of every M weights and lets the others decay."""

    sparse_products = (True, True, False)  # all weights get gradients

    kernel = "2:4"

    class Options(CommonOptions):
        n: int = Field(default=2, ge=1, le=64)
        """Number of weights of each group that are used (N)."""
        m: int = Field(default=4, ge=2, le=64)
        """Number of weights in a group (M)."""
        decay: float = Field(default=2e-4, ge=0, le=1)
        """Weight decay of unused weights, added to their gradient."""
        kernel: Literal["dense", "semi_structured"] = "dense"
        """Kernel of linear layers: dense with all weights, or the GPU's 2:4 kernels with the used ones."""

        @model_validator(mode="after")
        def _fewer(self) -> NM.Options:
            if self.n >= self.m:
                raise OptionError("n", f"{self.n} of {self.m} weights leave none out", self.m // 2)
            return self

    def __init__(self, context: SparsityContext) -> None:
        super().__init__(context)
        self._every = max(1, context.steps // LOOKS)
        self._used_masks: dict[str, Tensor] = {}
        """Full masks of the current step, by name."""
        self._products = self._updates = 0
        """Number of sparse products and of optimizer steps of this run."""

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield the reasons why it cannot run here."""
        options = experiment.sparsity.options
        fraction = 1 - options["n"] / options["m"]
        if experiment.sparsity.target not in (0.0, fraction):
            reason = f"{options['n']} of {options['m']} weights stay, so that {fraction:g} of them end as zero"
            yield Problem("sparsity.target", reason, fraction)
        if experiment.layout.dp_shard > 1 and experiment.layout.zero_stage == 3:
            reason = "fully_shard gathers the weights just before they are used, unmasked"
            yield Problem("layout.zero_stage", f"{reason}: N:M needs the full weights (zero_stage up to 2)", 2)
        if experiment.layout.tp > 1:
            reason = "a group of weights may be split between two ranks, which would choose differently"
            yield Problem("layout.tp", reason, 1)
        if options["kernel"] == "semi_structured":
            yield from semi_structured.problems(experiment, machine)
        yield from synchronous_only(experiment)
        yield from export_problems(experiment)

    @staticmethod
    def kernels_missing(machine: Machine) -> str:
        """Return why a machine cannot offer `kernel=semi_structured`; empty if it can."""
        return semi_structured.missing(machine)

    @staticmethod
    def prepare(
        model: nn.Module,
        experiment: Experiment,
        options: Any,
        shapes: dict[str, tuple[int, ...]],
        sample: Callable[[], Tensor],
    ) -> dict[str, Any]:
        """Replace linear layers by ones with 2:4 kernels and return them; raise ValueError if that is impossible."""
        if options.kernel == "dense":
            return {}
        from labkit.sparsity import two_four

        _, reason = two_four.kernels(next(model.parameters()).device)
        if reason:
            raise ValueError(reason)
        layers = two_four.replace(model, shapes)
        if not layers:
            rows, columns = two_four.SIDES
            reason = f"this model has no linear layer with outputs in multiples of {rows} and inputs of {columns}"
            raise ValueError(f"{reason}, as 2:4 kernels require (sparsity.kernel)")
        return layers

    @contextmanager
    def effective_weights(self, step: int | None = None) -> Iterator[None]:
        """Context manager in which unused weights are zero; see `Sparsifier.effective_weights`."""
        import torch

        local_parameters = self.masks.local_parameters()
        dense = {name: weight.detach().clone() for name, weight in local_parameters.items()}
        with torch.no_grad():
            for weight in local_parameters.values():
                weight.mul_(n_of_m(weight, self.options.n, self.options.m))
        before = self._set_masked(True)
        try:
            yield
        finally:
            products = self._set_masked(False) - before
            self._products += products if step is not None else 0
            with torch.no_grad():
                for name, weight in local_parameters.items():
                    weight.copy_(dense[name])

    def _set_masked(self, masked: bool) -> int:
        """Tell layers with 2:4 kernels whether their weights are masked; return the number of their sparse products."""
        for layer in self.context.layers.values():
            layer.masked = masked
        return sum(layer.products for layer in self.context.layers.values())

    def statistics(self) -> dict[str, Any]:
        """Return the mean number of sparse products per optimizer step."""
        if not self.context.layers:
            return {}
        return {"semi_structured_products": round(self._products / max(1, self._updates), 2)}

    def before_update(self, step: int) -> None:
        """Add the decay of unused weights to their gradients."""
        weights = self.masks.weights()
        self._used_masks = {name: n_of_m(weight, self.options.n, self.options.m) for name, weight in weights.items()}
        self.masks.add_to_gradients(
            {n: self.options.decay * ~self._used_masks[n] * weight for n, weight in weights.items()}
        )

    def after_update(self, step: int) -> None:
        """Measure now and then which fraction of the choice has flipped; after the last step, make it final."""
        self._updates += 1
        if (step + 1) % self._every == 0 or step + 1 == self.context.steps:
            after = {n: n_of_m(w, self.options.n, self.options.m) for n, w in self.masks.weights().items()}
            self.churn = {
                n: float((after[n] & ~used).sum()) / int(after[n].sum()) for n, used in self._used_masks.items()
            }
            if step + 1 == self.context.steps:
                self.masks.set(after)


def n_of_m(weight: Tensor, n: int, m: int) -> Tensor:
    """Return the mask of the `n` largest of every `m` consecutive weights along the inputs.

    Weights of an incomplete group at the end of a row are kept.
    """
    import torch

    from labkit.sparsity.block import as_matrix

    matrix = as_matrix(weight.detach()).abs()
    grouped = matrix.shape[1] // m * m
    groups = matrix[:, :grouped].reshape(-1, m)
    if matrix.is_cuda and m <= COMPARED:
        mask = _by_comparing(groups, n)
    else:
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(n, 1).indices, True)
    rest = torch.ones_like(matrix[:, grouped:], dtype=torch.bool)
    return torch.cat([mask.view(len(matrix), grouped), rest], 1).reshape(weight.shape)


def _by_comparing(groups: Tensor, n: int) -> Tensor:
    """Return the mask of the `n` largest in each row of [groups, m]; of equal numbers the first ones count as larger.

    They are those with fewer than n larger ones. On a GPU a row of four numbers occupies a whole block of topk's
    kernel; comparing all pairs took an eighth of the time (H200).
    """
    import torch

    mine, others = groups.unsqueeze(2), groups.unsqueeze(1)
    positions = torch.arange(groups.shape[1], device=groups.device)
    earlier = positions.unsqueeze(0) < positions.unsqueeze(1)
    before = (others > mine) | ((others == mine) & earlier)
    return before.sum(2, dtype=torch.int8) < n
