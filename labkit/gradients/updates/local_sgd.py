"""Local SGD: ranks train alone and average their weights every H steps (Stich, ICLR 2019; Lin et al., ICLR 2020).

To average n bytes over N ranks each sends 2·(N-1)/N·n bytes, once every H steps: per step that is 1/H of what
synchronous training sends. With H = 1 and SGD, the mean of the ranks' weights equals the result of the mean gradient,
also with momentum, because all of it is linear; with AdamW, which divides, it is only close.

Ranks average weights, buffers (running means of normalisations) and the moments of the optimizer, which for AdamW add
twice the bytes of the weights; without `average_optimizer` moments stay local.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from labkit.gradients.updates.own_steps import LocalStepOptions, local_lr_scale
from labkit.gradients.updates.update import AVERAGED, UpdateRule

if TYPE_CHECKING:
    from labkit.gradients.updates.update import UpdateContext


class LocalSGD(UpdateRule):
    """Averages the weights of all ranks every few steps."""

    masks_reach_optimizer = True
    replicas_diverge = True

    class Options(LocalStepOptions):
        every: int = Field(default=8, ge=1, le=1_000_000)
        """Local steps between two averagings (H)."""
        average_optimizer: bool = True
        """Average the moments of the optimizer too."""

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

    def after_update(self, step: int) -> int | None:
        """Average over all ranks every `every` steps and after the last one."""
        if (step + 1) % self.options.every == 0 or step + 1 == self.context.steps:
            self._average()
        return None

    def _average(self) -> None:
        from labkit.gradients.updates.average import average, average_bytes, optimizer_moments, weights_and_buffers

        tensors = weights_and_buffers(self.model)
        if self.options.average_optimizer:
            tensors += optimizer_moments(self.optimizer)
        average(tensors, self.comm)
        self.formula_bytes += average_bytes(tensors, self.comm.size)
