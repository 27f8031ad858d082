"""Post-local SGD: synchronous first, local from some point on (Lin et al., "Don't Use Large Mini-Batches", ICLR 2020).

The first part finds a good basin with the mean gradient, the second one saves communication and, in the paper,
generalizes better than large batches do. Each part sends what its own method sends (plain.py, local_sgd.py).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from pydantic import Field

from labkit.gradients.updates.local_sgd import LocalSGD

if TYPE_CHECKING:
    from labkit.gradients.updates.update import UpdateContext


class PostLocalSGD(LocalSGD):
    """Synchronous first, then local."""

    uses_ddp = True

    class Options(LocalSGD.Options):
        switch: float = Field(default=0.5, ge=0, le=1)
        """Part of the updates after which ranks train alone."""

    def __init__(self, context: UpdateContext) -> None:
        super().__init__(context)
        self.first_local = round(self.options.switch * context.steps)
        """The first update (counted from 0) whose gradient is not exchanged."""

    def lr_scale(self, step: int) -> float:
        """In the second part ranks step by themselves."""
        return super().lr_scale(step) if step >= self.first_local else 1.0

    def forward_backward(self, model: Any, last: bool, step: int) -> AbstractContextManager[Any]:
        """Gradients are exchanged in the last pass of the first part's updates."""
        return nullcontext() if last and step < self.first_local else model.no_sync()

    def after_update(self, step: int) -> int | None:
        """In the second part, the ranks meet every few updates."""
        return super().after_update(step) if step >= self.first_local else None
