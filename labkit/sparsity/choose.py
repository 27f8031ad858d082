"""Choosing weights: the largest, any, or (dynamic sparsity) the smallest go and others come."""

from __future__ import annotations

import torch
from torch import Tensor


def largest(scores: Tensor, count: int) -> Tensor:
    """Mask of exactly `count` largest scores, of the scores' shape."""
    flat = scores.flatten()
    mask = torch.zeros(len(flat), dtype=torch.bool, device=scores.device)
    if count > 0:
        mask[flat.topk(min(count, len(flat)), sorted=False).indices] = True
    return mask.view(scores.shape)


def any_of(shape: tuple[int, ...], count: int, seed: int) -> Tensor:
    """Mask of `count` places drawn with `seed`, on the CPU: equal wherever it is drawn."""
    return largest(torch.rand(shape, generator=torch.Generator().manual_seed(seed)), count)


def drop_and_grow(mask: Tensor, weight: Tensor, growth: Tensor, count: int) -> Tensor:
    """The mask in which the `count` smallest of the kept weights have given way to those with the largest `growth`.

    A weight that was dropped may come back at once if its growth is among the largest, as in RigL's own code.
    """
    remaining = int(mask.sum()) - count
    stays = largest(weight.abs().masked_fill(~mask, -1.0), remaining)
    return stays | largest(growth.abs().masked_fill(stays, -1.0), count)
