"""The driver's network: it processes each vehicle separately, pools the results, and decides.

The order of the vehicles in an observation has no meaning, so all rows pass through the same small network, followed by
the maximum over the vehicles (Zaheer et al. 2017, "Deep Sets", arXiv:1703.06114).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from labkit.workloads.base import Blocks, Plan


class Surroundings(nn.Module):
    """Observation [N, vehicles · features] to [N, width]: each vehicle paired with the driver, then the maximum."""

    tp_plan: ClassVar[Plan] = (("each.0", "colwise"), ("each.2", "rowwise"), ("each", "enter"))

    def __init__(self, vehicles: int, features: int, width: int) -> None:
        super().__init__()
        self.shape = (vehicles, features)
        self.each = nn.Sequential(nn.Linear(2 * features, width), nn.GELU(), nn.Linear(width, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.unflatten(-1, self.shape)
        own, others = rows[:, :1], rows[:, 1:]
        encoded = self.each(torch.cat([others, own.expand_as(others)], dim=-1))
        out: Tensor = self.norm(encoded.amax(1))
        return out


def driver(vehicles: int, features: int, actions: int, width: int, depth: int) -> Blocks:
    """Return blocks `surroundings`, `layer_0` … `layer_<depth-1>`, `head`: [N, vehicles · features] to [N, actions]."""
    blocks: dict[str, nn.Module] = {"surroundings": Surroundings(vehicles, features, width)}
    for index in range(depth):
        blocks[f"layer_{index}"] = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.GELU())
    blocks["head"] = nn.Linear(width, actions)
    return Blocks(blocks)
