"""Delayed gradients: what was computed d updates ago is applied now, so that its exchange has d updates to arrive.

All ranks apply the same mean gradient to the same weights, only a staler one: w ← w - η·g(w of d updates ago). Sources:
Zinkevich, Langford and Smola, "Slow Learners are Fast", NIPS 2009; Zhu et al., "Delayed Gradient Averaging", 2021. It
sends what synchronous training sends. The first d updates have nothing to apply; the last d gradients are not used.

With `predict`, gradients are computed where the weights will be when they are applied, as far as one can tell: d times
the last update ahead (Chen, Yang and Cheng, SpecTrain, 2018), or further, which damps what the delay excites (Kosson et
al., "Pipelined Backpropagation at Scale", 2021). Without it the loss pays more the larger the steps are.
"""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from pydantic import Field

from labkit.experiment.registry import Options as BaseOptions
from labkit.gradients.updates.update import UpdateRule

if TYPE_CHECKING:
    from torch import Tensor

    from labkit.gradients.updates.update import UpdateContext


class Delayed(UpdateRule):
    """Gradients some updates late."""

    one_batch = True

    class Options(BaseOptions):
        delay: int = Field(default=1, ge=0, le=100)
        """By how many updates gradients come late; 0 is synchronous training without overlap."""
        predict: float = Field(default=2.0, ge=0, le=10)
        """How far ahead of the weights gradients are computed, in units of the move that is expected; 0 for not."""

    def __init__(self, context: UpdateContext) -> None:
        super().__init__(context)
        self.max_step_skew = self.options.delay
        self._in_flight: deque[Any] = deque()
        self._applied = False
        self._old: list[Tensor] = []
        self._ahead: list[Tensor] = []
        """How far the weights are expected to move until a gradient is applied."""

    def forward_backward(self, model: Any, last: bool, step: int) -> AbstractContextManager[Any]:
        """With `predict`, ahead of the weights."""
        from labkit.gradients.updates.average import shifted_weights, trainable_weights

        return shifted_weights(trainable_weights(self.model), self._ahead) if self._ahead else nullcontext()

    def before_update(self, step: int) -> None:
        """Send this update's gradient, and put in its place the mean of the one whose time has come."""
        from labkit.gradients.cost import all_reduce_bytes
        from labkit.gradients.updates.gradient_vector import GradientVector

        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        gradients = GradientVector(self.model, self.context.irregular)
        vector = gradients.read()
        self.formula_bytes += all_reduce_bytes(vector.numel() * vector.element_size(), self.comm.size)
        self._in_flight.append(self.comm.all_reduce(vector))
        self._applied = len(self._in_flight) > self.options.delay
        if self._applied:
            gradients.write(self._in_flight.popleft().wait().div_(self.comm.size))
        else:
            for parameter in trained:
                parameter.grad = None  # the optimizer leaves such parameters alone
        if self.options.predict and self.options.delay:
            self._old = [parameter.detach().clone() for parameter in trained]

    def after_update(self, step: int) -> int | None:
        """Every gradient is as old as it is late."""
        if self._old:
            trained = [parameter.detach() for parameter in self.model.parameters() if parameter.requires_grad]
            reach = self.options.predict * self.options.delay
            self._ahead = [(new - old) * reach for new, old in zip(trained, self._old, strict=True)]
        return self.options.delay if self._applied else None

    def averaged_weights(self) -> AbstractContextManager[None]:
        """All ranks hold the same weights."""
        return nullcontext()

    def average_replicas(self, step: int) -> None:
        """All ranks hold the same state; what is under way is kept with it."""

    def state(self) -> dict[str, Tensor]:
        """Sums of the gradients under way, the oldest first, and where the weights are expected."""
        from labkit.gradients.updates.average import flatten

        kept = {f"delayed.{age:03}": pending.wait().cpu() for age, pending in enumerate(self._in_flight)}
        return kept | ({"ahead": flatten(self._ahead).cpu()} if self._ahead else {})

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on with what was under way."""
        import torch

        from labkit.gradients.updates.average import trainable_weights, unflatten_into
        from labkit.gradients.wire import PendingWork

        kept = [state[name] for name in sorted(state) if name.startswith("delayed.")]
        device = next(self.model.parameters()).device
        if "ahead" in state and self.options.predict:
            self._ahead = [torch.empty_like(weights) for weights in trainable_weights(self.model)]
            unflatten_into(self._ahead, state["ahead"].to(device))
        self._in_flight = deque(
            PendingWork(self.comm, None, sums.to(device)) for sums in kept[max(0, len(kept) - self.options.delay) :]
        )

    def close(self) -> None:
        """Gradients still under way are not used."""
        for pending in self._in_flight:
            pending.wait()
