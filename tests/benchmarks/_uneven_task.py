"""A chain of MLPs that widen with the square of their place: an equal number of blocks is a bad cut."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from labkit.workloads.base import Blocks, TensorData

WIDTH, BLOCKS, SAMPLES = 256, 10, 8192


class Residual(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, hidden), nn.GELU(), nn.Linear(hidden, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.inner(x)
        return out


def make() -> dict[str, Any]:
    torch.manual_seed(0)
    x = torch.randn(SAMPLES, WIDTH)
    data = TensorData(x=x, y=x.abs().sum(1, keepdim=True))
    blocks: dict[str, nn.Module] = {f"block_{i}": Residual(64 * (i + 1) ** 2) for i in range(BLOCKS)}
    blocks[f"block_{BLOCKS - 1}"] = nn.Sequential(blocks[f"block_{BLOCKS - 1}"], nn.Linear(WIDTH, 1))
    return {"model": Blocks(blocks), "train": data, "test": data, "loss_fn": nn.functional.mse_loss}
