"""Optimizers and the learning rate over time."""

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
    """The optimizer of the experiment, with torch's fused kernels, on pairs of parameter and "it decays".

    `make` makes another one from the groups (parameters, their weight_decay).
    """
    pairs = [(parameter, decays) for parameter, decays in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p, decays in pairs if decays], "weight_decay": settings.weight_decay},
        {"params": [p for p, decays in pairs if not decays], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if make is not None:
        return make(groups)
    # The fused kernels know real numbers only; the others take a complex one as two real ones.
    fused = not any(parameter.is_complex() for parameter, _ in pairs)
    if settings.name == "sgd":
        # With torch 2.13 the fused kernel of SGD, unlike that of AdamW, does not know sharded parameters.
        fused = fused and not any(isinstance(parameter, DTensor) for parameter, _ in pairs)
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, fused=fused)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.momentum, 0.999), eps=settings.eps, fused=fused)


def learning_rate(settings: Optimizer, step: int, steps: int) -> float:
    """Learning rate of update `step` of `steps`: a linear rise, then constant, or linear or cosine to zero."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    done = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    factor = 1 - done if settings.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return settings.lr * factor


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Use `value` from the next update on."""
    for group in optimizer.param_groups:
        group["lr"] = value
