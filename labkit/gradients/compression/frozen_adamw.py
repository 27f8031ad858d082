"""AdamW with denominators that are frozen after a warm-up: for late compressors (late.py), among them 1-bit Adam."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from labkit.experiment import Optimizer

FLOOR = 0.01
"""Smallest denominator, as a fraction of the root mean square of the denominators of its parameter."""


class FrozenAdamW(torch.optim.AdamW):
    """AdamW of torch for `warmup` steps; afterwards the mean squares v no longer change.

    If it `takes_momentum`, the gradient of a parameter holds the momentum itself from then on.

    Its state has the names of AdamW's, so that a checkpoint of one can be loaded by the other.
    """

    def __init__(
        self, groups: list[dict[str, Any]], settings: Optimizer, warmup: int, takes_momentum: bool = False
    ) -> None:
        self._betas, self._eps = (settings.beta1, settings.beta2), settings.eps
        super().__init__(groups, lr=settings.lr, betas=self._betas, eps=settings.eps, weight_decay=0, fused=True)
        self.warmup, self.takes_momentum = warmup, takes_momentum
        self._weights_are_masked = False
        self._updates: int | None = None
        self._denominators: dict[Tensor, Tensor] = {}

    @property
    def frozen_state(self) -> frozenset[str]:
        """Names of the state that no longer changes, whatever becomes of the weights: v, once it is frozen.

        A weight that a sparsity method adds later is divided by the v that was measured, and so is that of a run that
        is resumed from a checkpoint, which has nothing but v to compute the denominators from.
        """
        return frozenset({"exp_avg_sq"}) if self._updates_so_far() >= self.warmup else frozenset()

    def masks_changed(self) -> None:
        """Take note that weights are masked, by other masks than before: denominators are computed anew.

        Layers that store non-zero weights only have moved the state of their parameters to other weights.
        """
        self._weights_are_masked = True
        self._denominators.clear()

    def _updates_so_far(self) -> int:
        if self._updates is None:  # not in __init__: a checkpoint may have been loaded since
            self._updates = max((int(state["step"]) for state in self.state.values()), default=0)
        return self._updates

    @torch.no_grad()
    def blend(self, parameter: Tensor, gradient: Tensor) -> None:
        """Replace a gradient, in place, by the momentum that includes it; both are in units of the denominator."""
        momentum = self.state.get(parameter, {}).get("exp_avg")
        scaled = torch.zeros_like(gradient) if momentum is None else momentum / self.denominator(parameter)
        gradient.lerp_(scaled.view_as(gradient), self._betas[0])

    @torch.no_grad()
    def denominator(self, parameter: Tensor) -> Tensor:
        """Return √v + ε as it was frozen after the warm-up, in the shape of the parameter; ones if v is unknown.

        v is unknown while a parameter has had no gradient, or none but zeros (see `_estimate`). Where weights are
        masked, those whose v is zero, because a mask covered them during the warm-up, take the mean of the others.
        """
        denominator = self._denominators.get(parameter)
        if denominator is None:
            mean_squares = self._mean_squares(parameter)
            if mean_squares is None:
                return torch.ones_like(parameter)
            mean_squares = mean_squares / (1 - self._betas[1] ** self.warmup)
            floor = FLOOR * float(mean_squares.mean().sqrt())
            if self._weights_are_masked:
                measured = mean_squares != 0
                mean_squares = torch.where(measured, mean_squares, mean_squares.sum() / measured.sum())
            denominator = mean_squares.sqrt_().clamp_(min=floor).add_(self._eps)
            self._denominators[parameter] = denominator
        return denominator

    def _mean_squares(self, parameter: Tensor) -> Tensor | None:
        """Return Adam's v of a parameter; None if there is none, or if it is zero everywhere."""
        mean_squares: Tensor | None = self.state.get(parameter, {}).get("exp_avg_sq")
        return mean_squares if mean_squares is not None and bool(mean_squares.any()) else None

    def _estimate(self, parameter: Tensor, gradient: Tensor) -> None:
        """Set v of a parameter whose first gradient comes after the warm-up: the mean square of that gradient.

        v = 0 would divide by ε alone, and the weights would be lost in one step.
        """
        state = self.state[parameter]
        state.setdefault("step", torch.zeros((), device=parameter.device))
        state.setdefault("exp_avg", torch.zeros_like(parameter))
        if self.takes_momentum:
            gradient = gradient / (1 - self._betas[0])
        mean_square = gradient.square().mean() * (1 - self._betas[1] ** self.warmup)
        state["exp_avg_sq"] = torch.ones_like(parameter) * mean_square

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the weights from the gradients or, after the warm-up, from the averaged momentum."""
        self._updates = self._updates_so_far() + 1
        if self._updates <= self.warmup:
            super().step(closure)
            return
        correction = 1 - self._betas[0] ** self._updates
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                # Reading v makes the host wait for a GPU: once it is frozen, it is known.
                if parameter not in self._denominators and self._mean_squares(parameter) is None:
                    self._estimate(parameter, parameter.grad)
                state = self.state[parameter]
                state["step"] += 1
                state["exp_avg"].lerp_(parameter.grad, 1.0 if self.takes_momentum else 1 - self._betas[0])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.addcdiv_(state["exp_avg"], self.denominator(parameter), value=-group["lr"] / correction)
