"""Moments of AdamW in 8 bits: blocks of 256 elements share a scale (Dettmers et al. 2022, arXiv:2110.02861).

A code stands for a fraction of the largest magnitude of its block. Codes are equidistant on a *logarithmic* axis,
twelve per octave (steps of 6 %), because moments of one block differ by powers of ten and each matters for its own
weight:

    m: a sign and 127 codes, ten octaves; below that zero
    v: 255 codes, twenty-one octaves; never zero unless v is, since AdamW divides by √v

Rounding between neighbouring codes is stochastic, so that it is unbiased: v changes by a thousandth per step, and
rounded to the nearest code it would never change at all. The error of the random walk stays small, since most steps do
not change a code: about a sixth of v, a twelfth of √v.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from labkit.quantization.fused import fused

BLOCK = 256
"""Elements that share a scale."""
PER_OCTAVE = 12
"""Codes per factor of two."""
SMALLEST = 4096
"""Smaller tensors stay in float32 (as in bitsandbytes): they take few bytes and are often gains and biases."""


@lru_cache(maxsize=8)
def _values(top: int, device: torch.device) -> Tensor:
    """Return the values of the codes 0 … top: 0, then increasing to 1."""
    exponents = (torch.arange(top + 1, dtype=torch.float64) - top) / PER_OCTAVE
    values = exponents.exp2()
    values[0] = 0
    return values.to(device, torch.float32)


def pack(x: Tensor, signed: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Encode a float32 tensor as codes (uint8) [blocks · 256] and scales (float32) [blocks, 1]."""
    flat = x.reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    noise = torch.empty_like(blocks).uniform_(generator=generator)
    return _pack(blocks, noise, _values(127 if signed else 255, x.device), signed)


@fused
def _pack(blocks: Tensor, noise: Tensor, values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Encode blocks [blocks, 256] as `pack` does, rounded stochastically by `noise`, uniform in [0, 1)."""
    scale = blocks.abs().amax(1, keepdim=True)
    top = len(values) - 1
    fraction = blocks.abs().div_(scale.clamp_min(torch.finfo(torch.float32).tiny))
    low = fraction.log2().mul_(PER_OCTAVE).add_(top).floor_().clamp_(0, top).to(torch.int32)
    below, above = values[low], values[(low + 1).clamp_max_(top)]
    chance = (fraction - below) / (above - below).clamp_min_(torch.finfo(torch.float32).tiny)
    codes = low + (noise < chance)
    if signed:
        codes = codes + 128 * (blocks < 0)
    else:
        codes = codes.clamp_min_(1).mul_(blocks > 0)
    return codes.to(torch.uint8).view(-1), scale


def unpack(codes: Tensor, scale: Tensor, signed: bool, like: Tensor) -> Tensor:
    """Decode what `pack` returned to float32, in the shape of `like`."""
    numbers = _unpack(codes.view(-1, BLOCK), scale, _values(127 if signed else 255, codes.device), signed)
    return numbers.view(-1)[: like.numel()].view(like.shape)


@fused
def _unpack(codes: Tensor, scale: Tensor, values: Tensor, signed: bool) -> Tensor:
    index = codes.int()
    if not signed:
        return values[index] * scale
    numbers = values[index & 127]
    return torch.where(index < 128, numbers, -numbers) * scale
