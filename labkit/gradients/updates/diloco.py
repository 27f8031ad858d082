"""DiLoCo: H local steps, then one step of an outer optimizer on their outcome (Douillard et al., 2023).

    outer gradient = anchor - mean of the ranks' weights;  anchor ← Nesterov(anchor, outer gradient);  weights ← anchor

It sends 2·(N-1)/N·n bytes once every H steps, less if the outer gradient is sent in few bits (`bits`, narrow.py). The
outer optimizer is the same on all ranks; moments of the inner one stay local and are never sent; buffers are averaged.
With an outer learning rate of 1 and no momentum it is local SGD. H = 1 with momentum is *not* synchronous training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from labkit.gradients.updates.own_steps import LocalStepOptions, local_lr_scale
from labkit.gradients.updates.update import AVERAGED, UpdateRule

if TYPE_CHECKING:
    from torch import Tensor

    from labkit.gradients.updates.update import UpdateContext


class DiLoCo(UpdateRule):
    """Lets ranks take local steps, then applies an outer optimizer to their mean change."""

    masks_reach_optimizer = True
    replicas_diverge = True

    class Options(LocalStepOptions):
        every: int = Field(default=2, ge=1, le=1_000_000)
        """Local steps between two steps of the outer optimizer (H); a run needs a few hundred outer steps.

        The paper's runs of 88,000 steps use 500; in 400 steps of the language recipe the loss is 0.4 % worse with 2,
        and 3 to 5 % worse with 4 to 10.
        """
        outer_lr: float = Field(default=1.0, gt=0, le=10)
        """Learning rate of the outer optimizer (0.7 in the paper, which has hundreds of outer steps)."""
        outer_momentum: float = Field(default=0.2, ge=0, lt=1)
        """Nesterov momentum of the outer optimizer (0.9 in the paper: too much for a run of a dozen outer steps)."""
        bits: Literal[32, 16, 8, 4] = 32
        """Bits in which each value of the outer gradient is sent."""

    def __init__(self, context: UpdateContext) -> None:
        super().__init__(context)
        self.max_step_skew = self.options.every - 1

    @classmethod
    def inexact_resume(cls, options: Any, unscheduled: bool, restores_local_state: bool) -> str:
        """Return why the resume is not exact: a stop averages the local weights unless each rank gets its own back."""
        return AVERAGED if unscheduled and not restores_local_state else ""

    def lr_scale(self, step: int) -> float:
        """Return the learning-rate multiplier of local steps."""
        return local_lr_scale(self.options, self.context.experiment)

    def load(self, state: dict[str, Tensor]) -> None:
        """Create the outer optimizer from the current weights, or restore it from a checkpoint."""
        from labkit.gradients.updates.average import flatten, trainable_weights
        from labkit.gradients.updates.outer import Outer

        self.outer = Outer(flatten(trainable_weights(self.model)), self.options.outer_lr, self.options.outer_momentum)
        for name, tensor in (("anchor", self.outer.anchor), ("velocity", self.outer.velocity)):
            if f"outer.{name}" in state:
                tensor.copy_(state[f"outer.{name}"])

    def state(self) -> dict[str, Tensor]:
        """Return the anchor and the velocity of the outer optimizer."""
        tensors = {"anchor": self.outer.anchor, "velocity": self.outer.velocity}
        return {f"outer.{name}": tensor.cpu() for name, tensor in tensors.items()}

    def after_update(self, step: int) -> int | None:
        """Step the outer optimizer every H steps and after the last one."""
        if (step + 1) % self.options.every == 0 or step + 1 == self.context.steps:
            self._outer_step()
        return None

    def _outer_step(self) -> None:
        from labkit.gradients.compression.narrow import mean_bytes, start_mean
        from labkit.gradients.updates.average import (
            average,
            average_bytes,
            flatten,
            floating_buffers,
            trainable_weights,
            unflatten_into,
        )

        weights = trainable_weights(self.model)
        gradient = self.outer.anchor - flatten(weights)
        unflatten_into(weights, self.outer.step(start_mean(gradient, self.comm, self.options.bits)()))
        average(floating_buffers(self.model), self.comm)
        world_size = self.comm.size
        self.formula_bytes += mean_bytes(gradient.numel(), world_size, self.options.bits, gradient.element_size())
        self.formula_bytes += average_bytes(floating_buffers(self.model), world_size)
