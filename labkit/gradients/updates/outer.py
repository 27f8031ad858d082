"""The outer optimizer of DiLoCo: it moves the weights shared by all ranks by the mean change of the ranks' weights."""

from __future__ import annotations

import torch
from torch import Tensor


class Outer:
    """SGD with Nesterov momentum on flat weights (Douillard et al., DiLoCo, 2023).

    The outer gradient is the anchor minus the mean of the ranks' weights.
    """

    def __init__(self, anchor: Tensor, lr: float, momentum: float) -> None:
        self.anchor = anchor
        """Flat weights that are equal on all ranks."""
        self.lr, self.momentum = lr, momentum
        self.velocity = torch.zeros_like(anchor)

    def step(self, gradient: Tensor, begin: int = 0) -> Tensor:
        """Update the slice that starts at `begin` by its outer gradient, and return the new weights of that slice."""
        end = begin + gradient.numel()
        velocity, anchor = self.velocity[begin:end], self.anchor[begin:end]
        velocity.mul_(self.momentum).add_(gradient)
        anchor.sub_(self.lr * (gradient + self.momentum * velocity))
        return anchor
