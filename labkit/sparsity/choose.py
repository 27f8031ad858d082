"""Masks of weights: the largest, random ones, or (dynamic sparsity) with the smallest replaced by others."""

from __future__ import annotations

import torch
from torch import Tensor


def mask_of_largest(scores: Tensor, count: int) -> Tensor:
    """Return the mask of the `count` largest scores, in their shape; ties are broken so that the count is exact."""
    flat = scores.flatten()
    mask = torch.zeros(len(flat), dtype=torch.bool, device=scores.device)
    if count > 0:
        mask[flat.topk(min(count, len(flat)), sorted=False).indices] = True
    return mask.view(scores.shape)


def random_mask(shape: tuple[int, ...], count: int, seed: int) -> Tensor:
    """Return a mask of `count` random entries, drawn on the CPU from `seed`, so that it is the same everywhere."""
    return mask_of_largest(torch.rand(shape, generator=torch.Generator().manual_seed(seed)), count)


def drop_and_grow(mask: Tensor, weight: Tensor, growth: Tensor, count: int) -> Tensor:
    """Return a mask in which the `count` smallest of the kept weights are replaced by those with the largest `growth`.

    A weight that was dropped may grow back at once if its growth is among the largest, as in RigL's own code.
    """
    remaining = int(mask.sum()) - count
    remaining_mask = mask_of_largest(weight.abs().masked_fill(~mask, -1.0), remaining)
    return remaining_mask | mask_of_largest(growth.abs().masked_fill(remaining_mask, -1.0), count)
