"""Local SGD: ranks train alone and average their weights every H updates (Stich, ICLR 2019; Lin et al., ICLR 2020).

An average of n bytes over N ranks sends 2·(N-1)/N·n from each, once in H updates: per update that is 1/H of what
synchronous training sends. With H = 1 and SGD, the mean of the ranks' weights is what the mean gradient gives, also
with momentum, because all of it is linear; AdamW divides, so there it is close only.

What is averaged: weights, buffers (running means of normalisations) and the moments of the optimizer, which are twice
as much again for AdamW; without `average_optimizer` they stay local.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from labkit.gradients.updates.own_steps import LocalStepOptions, local_lr_scale
from labkit.gradients.updates.update import AVERAGED, UpdateRule

if TYPE_CHECKING:
    from labkit.gradients.updates.update import UpdateContext


class LocalSGD(UpdateRule):
    """Average the weights every few updates."""

    replicas_diverge = True

    class Options(LocalStepOptions):
        every: int = Field(default=8, ge=1, le=1_000_000)
        """Updates between two averages (H)."""
        average_optimizer: bool = True
        """Average the moments of the optimizer too."""

    def __init__(self, context: UpdateContext) -> None:
        super().__init__(context)
        self.max_step_skew = self.options.every - 1

    @classmethod
    def inexact_resume(cls, options: Any, unscheduled: bool, kept: bool) -> str:
        """The weights that ranks had to themselves are lost if they were averaged for a stop and not kept."""
        return AVERAGED if unscheduled and not kept else ""

    def lr_scale(self, step: int) -> float:
        """Ranks step by themselves."""
        return local_lr_scale(self.options, self.context.experiment)

    def after_update(self, step: int) -> int | None:
        """Every `every` updates, and after the last one, the ranks meet."""
        if (step + 1) % self.options.every == 0 or step + 1 == self.context.steps:
            self._meet()
        return None

    def _meet(self) -> None:
        from labkit.gradients.updates.average import average, average_bytes, optimizer_moments, weights_and_buffers

        tensors = weights_and_buffers(self.model)
        if self.options.average_optimizer:
            tensors += optimizer_moments(self.optimizer)
        average(tensors, self.comm)
        self.formula_bytes += average_bytes(tensors, self.comm.size)
