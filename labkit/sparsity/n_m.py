"""N:M sparsity: of every M neighbours along a layer's inputs, N are used (2:4 is what GPUs have kernels for).

Trained from scratch with SR-STE (Zhou et al., ICLR 2021, arXiv:2102.04010): the weights stay dense; forward and
backward use the N largest of every M, the gradient goes straight through to all of them, and what is not used is pulled
towards zero, so that the choice settles: the part of it that flips from one update to the next has to fall. After the
last update what is not used is zero.

Simulated here: zeros are multiplied like other numbers. No target: N/M says how many weights stay.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from labkit.experiment.problem import OptionError, Problem
from labkit.sparsity.method import Options as CommonOptions
from labkit.sparsity.method import Sparsifier, one_topology

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from labkit.experiment import Experiment
    from labkit.experiment.machine import Machine
    from labkit.sparsity.method import Setting

LOOKS = 100
"""How often in a run the choice is compared with that of the update before."""


class NM(Sparsifier):
    """SR-STE."""

    class Options(CommonOptions):
        n: int = Field(default=2, ge=1, le=64)
        """Weights of each group that are used (N)."""
        m: int = Field(default=4, ge=2, le=64)
        """Weights in a group (M)."""
        decay: float = Field(default=2e-4, ge=0, le=1)
        """Pull on the weights that are not used, added to their gradient."""

        @model_validator(mode="after")
        def _fewer(self) -> NM.Options:
            if self.n >= self.m:
                raise OptionError("n", f"{self.n} of {self.m} weights leave none out", self.m // 2)
            return self

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._every = max(1, setting.steps // LOOKS)
        self._used: dict[str, Tensor] = {}
        """Masks of the update, whole."""

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
        yield from one_topology(experiment)

    @contextmanager
    def passes(self, step: int | None = None) -> Iterator[None]:
        """The weights that are not used are zero meanwhile."""
        import torch

        held = self.masks.held()
        dense = {name: weight.detach().clone() for name, weight in held.items()}
        with torch.no_grad():
            for weight in held.values():
                weight.mul_(n_of_m(weight, self.options.n, self.options.m))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in held.items():
                    weight.copy_(dense[name])

    def before_update(self, step: int) -> None:
        """Pull what is not used towards zero."""
        weights = self.masks.weights()
        self._used = {name: n_of_m(weight, self.options.n, self.options.m) for name, weight in weights.items()}
        self.masks.add_to_gradients({n: self.options.decay * ~self._used[n] * weight for n, weight in weights.items()})

    def after_update(self, step: int) -> None:
        """Now and then, see which part of the choice has flipped; after the last update, keep to it."""
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
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(n, 1).indices, True)
    rest = torch.ones_like(matrix[:, whole:], dtype=torch.bool)
    return torch.cat([mask.view(len(matrix), whole), rest], 1).reshape(weight.shape)
