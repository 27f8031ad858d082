"""A small vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929), without class token: patches are averaged."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from labkit.workloads.base import Blocks, Plan
from labkit.workloads.models.stream import in_stream_dtype
from labkit.workloads.models.transformer import MLP, Attention, Layer


class PatchEmbedding(nn.Module):
    """Cut images into patches and embed each with its position: [N, channels, H, W] to [N, patches, width]."""

    tp_plan: ClassVar[Plan] = (("", "shard_output"),)
    cp_plan: ClassVar[Plan] = (("", "shard_output"),)

    def __init__(self, channels: int, image_size: int, patch: int, width: int) -> None:
        super().__init__()
        if image_size % patch:
            raise ValueError(f"patches of {patch} pixels do not divide images of {image_size}")
        self.project = nn.Conv2d(channels, width, patch, stride=patch)
        self.position = nn.Parameter(0.5 * torch.randn((image_size // patch) ** 2, width))

    def forward(self, x: Tensor) -> Tensor:
        patches: Tensor = self.project(x).flatten(2).transpose(1, 2)
        return in_stream_dtype(patches + self.position)


class MeanHead(nn.Module):
    """Normalise, average over the patches, classify: [N, patches, width] to [N, classes]."""

    tp_plan: ClassVar[Plan] = (("", "gather_input"),)
    cp_plan: ClassVar[Plan] = (("", "gather_input"),)
    """The mean needs all patches, in any order."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classify(self.norm(x).mean(1))
        return logits


def vit(channels: int, classes: int, image_size: int, patch: int, width: int, depth: int, heads: int) -> Blocks:
    """Return blocks `stem`, `layer_0` … `layer_<depth-1>`, `head`: images [N, channels, H, W] to [N, classes]."""
    blocks: dict[str, nn.Module] = {"stem": PatchEmbedding(channels, image_size, patch, width)}
    for index in range(depth):
        blocks[f"layer_{index}"] = Layer(width, Attention(width, heads, causal=False), MLP(width))
    blocks["head"] = MeanHead(width, classes)
    return Blocks(blocks)
