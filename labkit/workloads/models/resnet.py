"""A small residual network (He et al. 2016, arXiv:1512.03385) with group normalisation (Wu & He, arXiv:1803.08494).

Group normalisation uses one sample at a time. Batch normalisation would compute its mean and variance over the samples
that happen to be on one rank, so that two ranks with half of the batch each would compute something different from one
rank with the whole batch: data parallelism would no longer be exact.

The activation is SiLU (Hendrycks & Gimpel 2016, arXiv:1606.08415; Swish), not ReLU: at the kink of ReLU a rounding
error switches gradients on and off, and two float32 runs that differ only in the order of summation diverge by 1e-3
within twenty optimizer steps. With SiLU they stay within 1e-6, so that parity can be shown on the trained model.
"""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor, nn

from labkit.workloads.base import Blocks, Plan

MAP_SIDE = 4


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(channels, 8), channels)


class ResidualBlock(nn.Module):
    """silu(shortcut(x) + norm(conv(silu(norm(conv(x)))))): [N, in, H, W] to [N, out, H/stride, W/stride]."""

    tp_plan: ClassVar[Plan] = (
        *(("convs.0", "colwise"), ("convs.1", "group_norm")),
        *(("convs.3", "rowwise"), ("convs", "enter")),
    )

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
            _norm(out_channels),
            nn.SiLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            _norm(out_channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), _norm(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.shortcut(x) + self.convs(x))


def resnet(channels: int, classes: int, image_size: int, width: int, depth: int) -> Blocks:
    """Return blocks `stem`, `stage1_1` … `stage3_<depth>`, `head`: images [N, channels, H, W] to logits [N, classes].

    The stem halves the image, and the first block of stages 2 and 3 halves it again and doubles the channels: `width`,
    2·`width`, 4·`width`. Each stage has `depth` residual blocks. The head averages the map down to 4×4 and classifies
    that. Global average pooling, as is usual after batch normalisation, works badly here: group normalisation has just
    given the map of every sample nearly the same mean.
    """
    blocks: dict[str, nn.Module] = {
        "stem": nn.Sequential(nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False), _norm(width), nn.SiLU())
    }
    before = width
    for stage in (1, 2, 3):
        after = width * 2 ** (stage - 1)
        for index in range(depth):
            stride = 2 if stage > 1 and index == 0 else 1
            blocks[f"stage{stage}_{index + 1}"] = ResidualBlock(before, after, stride)
            before = after
    side = min(MAP_SIDE, math.ceil(image_size / 8))
    blocks["head"] = nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Flatten(), nn.Linear(before * side**2, classes))
    return Blocks(blocks)
