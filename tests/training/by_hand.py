"""What a loop of plain PyTorch computes, in float64, without any part of labkit but the order of the samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from labkit.experiment import Experiment
from labkit.training.sampling import BatchOrder
from labkit.workloads.seed import seeded

SEED = 3
WIDE = {torch.float32: torch.float64, torch.complex64: torch.complex128}


def wide(tensor: Tensor) -> Tensor:
    return tensor.to(WIDE.get(tensor.dtype, tensor.dtype))


@dataclass
class Loop:
    """Losses of all updates, norms of their gradients, the trained model, and its held-out loss."""

    loss: list[float]
    norm: list[float]
    model: nn.Module
    held_out: float


def loop(make: Callable[[], Any], experiment: Experiment, mean: Callable[..., Tensor] | None = None) -> Loop:
    """Train what `make` returns as the experiment says, a whole batch at once.

    `mean`: the loss of (output, y, indices of the samples), if it is not the task's own.
    """
    with seeded(SEED):
        made = make()
    model, (x, y), (test_x, test_y), loss_fn = (made[name] for name in ("model", "train", "test", "loss_fn"))
    model._apply(wide)
    if isinstance(loss_fn, nn.Module):
        loss_fn._apply(wide)
    x, y, test_x, test_y = (wide(tensor) for tensor in (x, y, test_x, test_y))
    settings, training = experiment.optimizer, experiment.training
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    if settings.name == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)
    else:
        optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.momentum, 0.999), eps=settings.eps)
    order = BatchOrder(len(x), training.global_batch, training.seed)
    losses, norms = [], []
    for step in range(training.steps or 0):
        indices = torch.as_tensor(order.update(step))
        output = model(x[indices])
        loss = mean(output, y[indices], indices) if mean is not None else loss_fn(output, y[indices])
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        squares = [p.grad.abs().square().sum() for p in trained if p.grad is not None]
        norms.append(float(torch.stack(squares).sum().sqrt()))
        optimizer.step()
    model.eval()
    with torch.no_grad():
        held_out = float(loss_fn(model(test_x), test_y))
    return Loop(losses, norms, model, held_out)
