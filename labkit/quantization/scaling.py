"""Loss scaling for float16 (Micikevicius et al. 2018, arXiv:1710.03740), with the scaler of Accelerate.

The loss is multiplied by the scale, and the gradients are divided by it after the backward pass. torch's fused
optimizers skip a step by themselves if they are told that a gradient was infinite, so the CPU does not wait for the
GPU.
"""

from __future__ import annotations

from typing import Any

import torch


class LossScaling:
    """Scales losses and unscales gradients with `scaler`, a torch.amp.GradScaler."""

    def __init__(self, scaler: Any, device: torch.device) -> None:
        self._scaler = scaler
        self._unit = torch.ones((), device=device)
        self.skipped_steps = torch.zeros((), device=device)
        """Number of steps that were skipped because a gradient overflowed."""

    def scaled(self, weight: float) -> Any:
        """Return the weight of a loss multiplied by the scale."""
        return self._scaler.scale(self._unit * weight)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale, and tell the optimizer whether to skip the step."""
        self._scaler.unscale_(optimizer)
        (found_inf,) = self._scaler._found_inf_per_device(optimizer).values()
        fused: Any = optimizer
        fused.grad_scale, fused.found_inf = None, found_inf
        self.skipped_steps += found_inf
        self._scaler.update()

    def statistics(self) -> dict[str, Any]:
        """Return the current scale and the number of skipped steps, for the summary."""
        return {"loss_scale": self._scaler.get_scale(), "updates_left_out": int(self.skipped_steps)}
