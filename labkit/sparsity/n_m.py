"""N:M sparsity: of every M neighbours along a layer's inputs, N are used (2:4 is what GPUs have kernels for).

Trained from scratch with SR-STE (Zhou et al., ICLR 2021, arXiv:2102.04010): the weights stay dense; forward and
backward use the N largest of every M, the gradient goes straight through to all of them, and what is not used is pulled
towards zero, so that the choice settles: the part of it that flips from one update to the next has to fall. After the
last update what is not used is zero.

Zeros are multiplied like other numbers; with `sparsity.kernel=semi_structured`, on GPUs that have kernels for 2:4, they
are left out of the forward products (two_four.py). No target: N/M says how many weights stay.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from labkit.experiment.problem import OptionError, Problem
from labkit.sparsity import semi_structured
from labkit.sparsity.method import Options as CommonOptions
from labkit.sparsity.method import Sparsifier, exportable, one_topology

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from labkit.experiment import Experiment
    from labkit.experiment.machine import Machine
    from labkit.sparsity.method import SparsityContext

COMPARED = 8
"""Groups of at most so many weights are ranked by comparing all pairs on GPUs."""
LOOKS = 100
"""How often in a run the choice is compared with that of the update before."""


class NM(Sparsifier):
    """SR-STE."""

    sparse_products = (True, True, False)  # gradients go to all weights

    kernel = "2:4"

    class Options(CommonOptions):
        n: int = Field(default=2, ge=1, le=64)
        """Weights of each group that are used (N)."""
        m: int = Field(default=4, ge=2, le=64)
        """Weights in a group (M)."""
        decay: float = Field(default=2e-4, ge=0, le=1)
        """Pull on the weights that are not used, added to their gradient."""
        kernel: Literal["dense", "semi_structured"] = "dense"
        """What linear layers multiply with: all weights, or by GPUs' kernels for 2:4 the ones that are used."""

        @model_validator(mode="after")
        def _fewer(self) -> NM.Options:
            if self.n >= self.m:
                raise OptionError("n", f"{self.n} of {self.m} weights leave none out", self.m // 2)
            return self

    def __init__(self, setting: SparsityContext) -> None:
        super().__init__(setting)
        self._every = max(1, setting.steps // LOOKS)
        self._used: dict[str, Tensor] = {}
        """Masks of the update, whole."""
        self._products = self._updates = 0
        """Sparse products of all updates of this run."""

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Why it cannot run here."""
        options = experiment.sparsity.options
        part = 1 - options["n"] / options["m"]
        if experiment.sparsity.target not in (0.0, part):
            said = f"{options['n']} of {options['m']} weights stay, so that {part:g} of them end as zero"
            yield Problem("sparsity.target", said, part)
        if experiment.layout.dp_shard > 1 and experiment.layout.zero_stage == 3:
            said = "the weights are put together by fully_shard just before they are used, unmasked"
            yield Problem("layout.zero_stage", f"{said}: N:M needs them whole (zero_stage up to 2)", 2)
        if experiment.layout.tp > 1:
            said = "a group of weights may fall into two ranks' parts, which would choose differently"
            yield Problem("layout.tp", said, 1)
        if options["kernel"] == "semi_structured":
            yield from semi_structured.problems(experiment, machine)
        yield from one_topology(experiment)
        yield from exportable(experiment)

    @staticmethod
    def kernels_missing(machine: Machine) -> str:
        """Why a machine cannot offer `kernel=semi_structured`; empty if it can."""
        return semi_structured.missing(machine)

    @staticmethod
    def prepare(
        model: nn.Module,
        experiment: Experiment,
        options: Any,
        shapes: dict[str, tuple[int, ...]],
        sample: Callable[[], Tensor],
    ) -> dict[str, Any]:
        """Layers with 2:4 kernels; ValueError where there are none."""
        if options.kernel == "dense":
            return {}
        from labkit.sparsity import two_four

        _, reason = two_four.kernels(next(model.parameters()).device)
        if reason:
            raise ValueError(reason)
        made = two_four.replace(model, shapes)
        if not made:
            rows, columns = two_four.SIDES
            said = f"this model has no linear layer with outputs in multiples of {rows} and inputs of {columns}"
            raise ValueError(f"{said}, as 2:4 kernels want it (sparsity.kernel)")
        return made

    @contextmanager
    def passes(self, step: int | None = None) -> Iterator[None]:
        """The weights that are not used are zero meanwhile."""
        import torch

        held = self.masks.held()
        dense = {name: weight.detach().clone() for name, weight in held.items()}
        with torch.no_grad():
            for weight in held.values():
                weight.mul_(n_of_m(weight, self.options.n, self.options.m))
        before = self._sparse(True)
        try:
            yield
        finally:
            made = self._sparse(False) - before
            self._products += made if step is not None else 0
            with torch.no_grad():
                for name, weight in held.items():
                    weight.copy_(dense[name])

    def _sparse(self, masked: bool) -> int:
        """Tell layers with kernels whether their weights are 2:4; how many products they have made so far."""
        for layer in self.setting.layers.values():
            layer.masked = masked
        return sum(layer.products for layer in self.setting.layers.values())

    def found(self) -> dict[str, Any]:
        """Sparse products of an update."""
        if not self.setting.layers:
            return {}
        return {"semi_structured_products": round(self._products / max(1, self._updates), 2)}

    def before_update(self, step: int) -> None:
        """Pull what is not used towards zero."""
        weights = self.masks.weights()
        self._used = {name: n_of_m(weight, self.options.n, self.options.m) for name, weight in weights.items()}
        self.masks.add_to_gradients({n: self.options.decay * ~self._used[n] * weight for n, weight in weights.items()})

    def after_update(self, step: int) -> None:
        """Now and then, see which part of the choice has flipped; after the last update, keep to it."""
        self._updates += 1
        if (step + 1) % self._every == 0 or step + 1 == self.setting.steps:
            after = {n: n_of_m(w, self.options.n, self.options.m) for n, w in self.masks.weights().items()}
            self.churn = {n: float((after[n] & ~used).sum()) / int(after[n].sum()) for n, used in self._used.items()}
            if step + 1 == self.setting.steps:
                self.masks.set(after)


def n_of_m(weight: Tensor, n: int, m: int) -> Tensor:
    """Mask of the `n` largest of every `m` weights that follow each other along the inputs; what is left over at the
    end of a row stays.
    """
    import torch

    from labkit.sparsity.block import as_matrix

    matrix = as_matrix(weight.detach()).abs()
    whole = matrix.shape[1] // m * m
    groups = matrix[:, :whole].reshape(-1, m)
    if matrix.is_cuda and m <= COMPARED:
        mask = _by_comparing(groups, n)
    else:
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(n, 1).indices, True)
    rest = torch.ones_like(matrix[:, whole:], dtype=torch.bool)
    return torch.cat([mask.view(len(matrix), whole), rest], 1).reshape(weight.shape)


def _by_comparing(groups: Tensor, n: int) -> Tensor:
    """Mask of the `n` largest in each row of [groups, m]: those with fewer than n larger ones, the first of equal ones.

    On a GPU a row of four numbers occupies a whole block of topk's kernel; comparing all pairs took an eighth of the
    time (H200).
    """
    import torch

    mine, others = groups.unsqueeze(2), groups.unsqueeze(1)
    places = torch.arange(groups.shape[1], device=groups.device)
    earlier = places.unsqueeze(0) < places.unsqueeze(1)
    before = (others > mine) | ((others == mine) & earlier)
    return before.sum(2, dtype=torch.int8) < n
