"""A multi-layer perceptron as a chain of blocks."""

from __future__ import annotations

from torch import nn

from labkit.workloads.base import Blocks


def mlp(inputs: int, outputs: int, width: int, depth: int) -> Blocks:
    """Blocks `layer_0` … `layer_<depth-1>`, `head`: [N, inputs] to [N, outputs]; each layer is linear, norm, GELU."""
    blocks: dict[str, nn.Module] = {}
    for index in range(depth):
        size = inputs if index == 0 else width
        blocks[f"layer_{index}"] = nn.Sequential(nn.Linear(size, width), nn.LayerNorm(width), nn.GELU())
    blocks["head"] = nn.Linear(width, outputs)
    return Blocks(blocks)
