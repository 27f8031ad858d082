"""Optimizers and the learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from labkit.experiment import Optimizer


def make_optimizer(
    settings: Optimizer,
    parameters: Iterable[tuple[nn.Parameter, bool]],
    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
) -> torch.optim.Optimizer:
    """Return the optimizer of the experiment, with torch's fused kernels where they exist.

    `parameters` are pairs of a parameter and whether weight decay applies to it. If `make` is given, it builds the
    optimizer from the parameter groups instead.
    """
    pairs = [(parameter, decays) for parameter, decays in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p, decays in pairs if decays], "weight_decay": settings.weight_decay},
        {"params": [p for p, decays in pairs if not decays], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if make is not None:
        return make(groups)
    # Fused kernels support only real numbers; the others treat a complex number as two real ones.
    fused = not any(parameter.is_complex() for parameter, _ in pairs)
    if settings.name == "sgd":
        # With torch 2.13 the fused kernel of SGD, unlike that of AdamW, does not support sharded parameters.
        fused = fused and not any(isinstance(parameter, DTensor) for parameter, _ in pairs)
        sgd = torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, fused=fused)
        if fused and settings.momentum:
            sgd.register_step_pre_hook(_begin_late_momenta)
        return sgd
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps, fused=fused)


def _begin_late_momenta(sgd: torch.optim.Optimizer, *_arguments: Any) -> None:
    """Give parameters whose first gradient comes later than that of others a velocity of zero.

    torch 2.13's fused kernel of SGD fails if some of its parameters have a velocity and others have none; from zero,
    the first velocity is the gradient, as it is without the kernel.
    """
    for group in sgd.param_groups:
        used = [parameter for parameter in group["params"] if parameter.grad is not None]
        late = [parameter for parameter in used if sgd.state[parameter].get("momentum_buffer") is None]
        for parameter in late if len(late) < len(used) else ():
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def learning_rate(settings: Optimizer, step: int, steps: int) -> float:
    """Return the learning rate of step `step` of `steps`: warm-up, then constant, linear or cosine decay to 0."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    progress = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    factor = 1 - progress if settings.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return settings.lr * factor


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of all parameter groups to `value`."""
    for group in optimizer.param_groups:
        group["lr"] = value
