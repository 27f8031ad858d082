"""A scaled loss for float16 (Micikevicius et al. 2018, arXiv:1710.03740), with the scaler that Accelerate made.

The loss is weighed with the scale, the gradients are divided by it once they are there. The fused optimizers of torch
leave an update out by themselves where they are told that something was infinite, so nobody waits for the GPU.
"""

from __future__ import annotations

from typing import Any

import torch


class LossScaling:
    """`scaler`: a torch.amp.GradScaler."""

    def __init__(self, scaler: Any, device: torch.device) -> None:
        self._scaler = scaler
        self._one = torch.ones((), device=device)
        self.left_out = torch.zeros((), device=device)
        """Updates that overflowed."""

    def scaled(self, weight: float) -> Any:
        """The weight of a loss, times the scale."""
        return self._scaler.scale(self._one * weight)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients of an update, and tell the optimizer whether to leave it out."""
        self._scaler.unscale_(optimizer)
        (found,) = self._scaler._found_inf_per_device(optimizer).values()
        fused: Any = optimizer
        fused.grad_scale, fused.found_inf = None, found
        self.left_out += found
        self._scaler.update()

    def found(self) -> dict[str, Any]:
        """The scale in force and the updates that were left out."""
        return {"loss_scale": self._scaler.get_scale(), "updates_left_out": int(self.left_out)}
