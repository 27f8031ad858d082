"""Delayed gradients: a gradient that was computed d steps ago is applied now, so that its all-reduce may take d steps.

All ranks apply the same mean gradient to the same weights, only a staler one: w ← w - η·g(w of d steps ago). Sources:
Zinkevich, Langford and Smola, "Slow Learners are Fast", NIPS 2009; Zhu et al., "Delayed Gradient Averaging", 2021. It
sends as many bytes as synchronous training. The first d steps have nothing to apply; the last d gradients are not used.

With `predict`, gradients are computed at the weights that are expected when they are applied: d times the last change
of the weights ahead (Chen, Yang and Cheng, SpecTrain, 2018), or further, which damps the oscillations that the delay
excites (Kosson et al., "Pipelined Backpropagation at Scale", 2021). Without it, the larger the steps, the more the loss
suffers.
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
    """Applies each mean gradient a fixed number of steps late."""

    masks_reach_optimizer = True
    one_batch = True

    class Options(BaseOptions):
        delay: int = Field(default=1, ge=0, le=100)
        """Number of steps by which gradients are late; 0 is synchronous training without overlap."""
        predict: float = Field(default=2.0, ge=0, le=10)
        """How far ahead of the weights gradients are computed, in multiples of the expected change; 0 turns it off."""

    def __init__(self, context: UpdateContext) -> None:
        super().__init__(context)
        self.max_step_skew = self.options.delay
        self._in_flight: deque[Any] = deque()
        self._applied = False
        self._old_weights: list[Tensor] = []
        self._offsets: list[Tensor] = []
        """Expected change of the weights until a gradient is applied."""

    def forward_backward(self, model: Any, last: bool, step: int) -> AbstractContextManager[Any]:
        """Return a context manager that shifts the weights to those expected, if `predict` asks for it."""
        from labkit.gradients.updates.average import shifted_weights, trainable_weights

        return shifted_weights(trainable_weights(self.model), self._offsets) if self._offsets else nullcontext()

    def before_update(self, step: int) -> None:
        """Start to reduce this step's gradient, and replace it by the mean gradient that is due."""
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
            self._old_weights = [parameter.detach().clone() for parameter in trained]

    def after_update(self, step: int) -> int | None:
        """Return the staleness of the gradient, which is the delay; None if none was applied."""
        if self._old_weights:
            trained = [parameter.detach() for parameter in self.model.parameters() if parameter.requires_grad]
            factor = self.options.predict * self.options.delay
            self._offsets = [(new - old) * factor for new, old in zip(trained, self._old_weights, strict=True)]
        return self.options.delay if self._applied else None

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Return a context manager that does nothing: all ranks hold the same weights."""
        return nullcontext()

    def average_replicas(self, step: int) -> None:
        """Do nothing: all ranks hold the same state, and gradients in flight are stored with it."""

    def state(self) -> dict[str, Tensor]:
        """Return the sums of the gradients in flight, the oldest first, and the expected change of the weights."""
        from labkit.gradients.updates.average import flatten

        state = {f"delayed.{age:03}": pending.wait().cpu() for age, pending in enumerate(self._in_flight)}
        return state | ({"ahead": flatten(self._offsets).cpu()} if self._offsets else {})

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore the gradients in flight and the expected change of the weights."""
        import torch

        from labkit.gradients.updates.average import trainable_weights, unflatten_into
        from labkit.gradients.wire import PendingWork

        stored = [state[name] for name in sorted(state) if name.startswith("delayed.")]
        device = next(self.model.parameters()).device
        if "ahead" in state and self.options.predict:
            self._offsets = [torch.empty_like(weights) for weights in trainable_weights(self.model)]
            unflatten_into(self._offsets, state["ahead"].to(device))
        self._in_flight = deque(
            PendingWork(self.comm, None, sums.to(device)) for sums in stored[max(0, len(stored) - self.options.delay) :]
        )

    def close(self) -> None:
        """Wait for the gradients still in flight, which are not used."""
        for pending in self._in_flight:
            pending.wait()
