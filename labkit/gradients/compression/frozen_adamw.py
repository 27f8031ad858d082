"""AdamW that stops learning its denominators: for compressors, and the optimizer of 1-bit Adam (late.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from labkit.experiment import Optimizer

FLOOR = 0.01
"""A denominator is at least such a part of the root mean square of those of its parameter."""


class FrozenAdamW(torch.optim.AdamW):
    """For `warmup` updates torch's AdamW; after that mean squares stay.

    If it `takes_momentum`, what it is given from then on is the momentum itself.

    Its state has the names of AdamW's, so that a checkpoint of one goes on in the other.
    """

    def __init__(
        self, groups: list[dict[str, Any]], settings: Optimizer, warmup: int, takes_momentum: bool = False
    ) -> None:
        self._betas, self._eps = (settings.momentum, 0.999), settings.eps
        super().__init__(groups, lr=settings.lr, betas=self._betas, eps=settings.eps, weight_decay=0, fused=True)
        self.warmup, self.takes_momentum = warmup, takes_momentum
        self._updates: int | None = None
        self._denominators: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def blend(self, parameter: Tensor, gradient: Tensor) -> None:
        """Make of a gradient, in place, the momentum with it in it; both in units of the denominator."""
        known = (self.state[parameter]["exp_avg"] / self.denominator(parameter)).view_as(gradient)
        gradient.lerp_(known, self._betas[0])

    @torch.no_grad()
    def denominator(self, parameter: Tensor) -> Tensor:
        """√v + ε as the warm-up has left it."""
        found = self._denominators.get(parameter)
        if found is None:
            mean_squares = self.state[parameter]["exp_avg_sq"] / (1 - self._betas[1] ** self.warmup)
            floor = FLOOR * float(mean_squares.mean().sqrt())
            found = self._denominators[parameter] = mean_squares.sqrt_().clamp_(min=floor).add_(self._eps)
        return found

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update."""
        if self._updates is None:  # a checkpoint may have been read meanwhile
            self._updates = max((int(state["step"]) for state in self.state.values()), default=0)
        self._updates += 1
        if self._updates <= self.warmup:
            super().step(closure)
            return
        correction = 1 - self._betas[0] ** self._updates
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["step"] += 1
                state["exp_avg"].lerp_(parameter.grad, 1.0 if self.takes_momentum else 1 - self._betas[0])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.addcdiv_(state["exp_avg"], self.denominator(parameter), value=-group["lr"] / correction)
