"""A workload of somebody's own with what the built-in ones lack: frozen weights, running means, a closed loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from labkit.workloads.custom_task import as_task


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(6, 8)
        self.frozen.requires_grad_(False)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)
        self.its_own_attribute = 7.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.norm(self.frozen(x)))
        return out


def make() -> Any:
    x = torch.randn(64, 6)
    y = (x.sum(1) > 0).long()
    task = as_task((Odd(), (x, y), (x, y), nn.CrossEntropyLoss()), "make")
    plain = task.metrics

    def closed_loop(model: Any, rank: int, world_size: int, seed: int) -> dict[str, float]:
        return {"own": float(getattr(model, "its_own_attribute", 0.0))} if world_size > 1 else {"own": 0.0}

    def metrics(sums: Any) -> dict[str, float]:
        return plain(sums) | ({"own": sums["own"]} if "own" in sums else {})

    task.closed_loop, task.metrics = closed_loop, metrics  # type: ignore[method-assign]
    return task
