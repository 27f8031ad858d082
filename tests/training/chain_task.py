"""A model of one's own as a chain of blocks: it can be cut into pipeline stages."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from labkit.workloads.base import Blocks, TensorData


def make() -> dict[str, Any]:
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    data = TensorData(x=x, y=(x.sum(1) > 0).long())
    blocks = {f"part_{number}": nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for number in range(5)}
    return {
        "model": Blocks(blocks | {"head": nn.Linear(8, 2)}),
        "train": data,
        "test": data,
        "loss_fn": nn.functional.cross_entropy,
    }


def lower_frozen() -> dict[str, Any]:
    """The first parts are not trained."""
    parts = make()
    for number in (0, 1):
        parts["model"].blocks[f"part_{number}"].requires_grad_(False)
    return parts


def shared_module() -> dict[str, Any]:
    """One module in two places of the chain."""
    parts = make()
    blocks = dict(parts["model"].blocks)
    return parts | {"model": Blocks(blocks | {"part_4": blocks["part_0"]})}


def unbroken() -> dict[str, Any]:
    """The same in one piece."""
    parts = make()
    return parts | {"model": nn.Sequential(*parts["model"].blocks.values())}
