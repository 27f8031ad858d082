"""The outer optimizer of DiLoCo: it moves weights that all ranks agree on by what the ranks have moved on average."""

from __future__ import annotations

import torch
from torch import Tensor


class Outer:
    """SGD with Nesterov momentum on flat weights: Douillard et al., DiLoCo, 2023.

    The outer gradient is how far the ranks have come: anchor - mean of their weights.
    """

    def __init__(self, anchor: Tensor, lr: float, momentum: float) -> None:
        self.anchor = anchor
        """The weights that all ranks agree on, flat."""
        self.lr, self.momentum = lr, momentum
        self.velocity = torch.zeros_like(anchor)

    def step(self, gradient: Tensor, begin: int = 0) -> Tensor:
        """Move the stretch from `begin` on by its outer gradient; returns the new weights of that stretch."""
        end = begin + gradient.numel()
        velocity, anchor = self.velocity[begin:end], self.anchor[begin:end]
        velocity.mul_(self.momentum).add_(gradient)
        anchor.sub_(self.lr * (gradient + self.momentum * velocity))
        return anchor
