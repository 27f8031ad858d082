"""Post-local SGD: synchronous first, then local (Lin et al., "Don't Use Large Mini-Batches", ICLR 2020).

The first phase finds a good basin with the mean gradient; the second one saves communication and, in the paper,
generalizes better than large batches do. Each phase sends what its own method sends (plain.py, local_sgd.py).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from pydantic import Field

from labkit.gradients.updates.local_sgd import LocalSGD

if TYPE_CHECKING:
    from labkit.gradients.updates.update import UpdateContext


class PostLocalSGD(LocalSGD):
    """Averages gradients in every step first, then weights every few steps."""

    uses_ddp = True

    class Options(LocalSGD.Options):
        switch: float = Field(default=0.5, ge=0, le=1)
        """Fraction of the training after which ranks take local steps."""

    def __init__(self, context: UpdateContext) -> None:
        super().__init__(context)
        self.first_local = round(self.options.switch * context.steps)
        """First step (counted from 0) whose gradient is not averaged over ranks."""

    def lr_scale(self, step: int) -> float:
        """Return the learning-rate multiplier, which is 1 before local steps begin."""
        return super().lr_scale(step) if step >= self.first_local else 1.0

    def forward_backward(self, model: Any, last: bool, step: int) -> AbstractContextManager[Any]:
        """Return a context manager that keeps DDP from reducing, except in the last pass of a synchronous step."""
        return nullcontext() if last and step < self.first_local else model.no_sync()

    def after_update(self, step: int) -> int | None:
        """Average over all ranks every few steps, once local steps have begun."""
        return super().after_update(step) if step >= self.first_local else None
