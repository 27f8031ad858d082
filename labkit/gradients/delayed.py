"""Delayed gradients: what was computed d updates ago is applied now, so that its exchange has d updates to arrive.

All ranks apply the same mean gradient to the same weights, only a staler one: w ← w - η·g(w of d updates ago). Sources:
Zinkevich, Langford and Smola, "Slow Learners are Fast", NIPS 2009; Zhu et al., "Delayed Gradient Averaging", 2021. It
sends what synchronous training sends. The first d updates have nothing to apply; the last d gradients are not used.
"""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from pydantic import Field

from labkit.experiment.registry import Options as BaseOptions
from labkit.gradients.update import Rounds

if TYPE_CHECKING:
    from torch import Tensor

    from labkit.gradients.update import Setting


class Delayed(Rounds):
    """Gradients some updates late."""

    class Options(BaseOptions):
        delay: int = Field(default=1, ge=0, le=100)
        """By how many updates gradients come late; 0 is synchronous training without overlap."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._under_way: deque[Any] = deque()
        self._applied = False

    def before_update(self, step: int) -> None:
        """Send this update's gradient, and put in its place the mean of the one whose time has come."""
        from labkit.gradients.average import average_bytes, fill, flat

        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        self._under_way.append(self.wire.all_reduce(flat(gradients)))
        self.formula_bytes += average_bytes(gradients, self.wire.size)
        self._applied = len(self._under_way) > self.options.delay
        if self._applied:
            fill(gradients, self._under_way.popleft().wait().div_(self.wire.size))
        else:
            for parameter in trained:
                parameter.grad = None  # the optimizer leaves such parameters alone

    def after_update(self, step: int) -> int | None:
        """Every gradient is as old as it is late."""
        return self.options.delay if self._applied else None

    def judged(self) -> AbstractContextManager[None]:
        """All ranks hold the same weights."""
        return nullcontext()

    def consolidate(self, step: int) -> None:
        """All ranks hold the same state; what is under way is kept with it."""

    def state(self) -> dict[str, Tensor]:
        """Sums of the gradients under way, the oldest first."""
        return {f"delayed.{age:03}": pending.wait().cpu() for age, pending in enumerate(self._under_way)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on with what was under way."""
        from labkit.gradients.wire import Pending

        kept = [state[name] for name in sorted(state) if name.startswith("delayed.")]
        device = next(self.model.parameters()).device
        self._under_way = deque(
            Pending(self.wire, None, sums.to(device)) for sums in kept[max(0, len(kept) - self.options.delay) :]
        )

    def close(self) -> None:
        """Gradients still under way are not used."""
        for pending in self._under_way:
            pending.wait()
