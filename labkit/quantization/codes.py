"""Quantization grids (integer codes with a scale) of training, quantization-aware training and conversion.

All grids are symmetric: zero is a code, code c stands for c · scale, and the largest magnitude that shares the scale
gets the highest code.

| grid    | codes       | elements that share a scale                   |
|---------|-------------|-----------------------------------------------|
| int8    | -127 … 127  | a row: the inputs of an output, or a token    |
| int4    | -7 … 7      | 32 consecutive inputs of an output            |
| ternary | -1, 0, 1    | the whole weight, by its mean magnitude       |
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from labkit.quantization.fused import fused

INT8, INT4 = 127, 7
"""The highest codes."""
GROUP = 32
"""Inputs that share a scale in int4."""
TERNARY_EPS = 1e-5
"""Smallest scale of a ternary weight, as in the paper."""


def rounded(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Round to the nearest integer or, with a generator, stochastically up or down so that the mean is x."""
    if generator is None:
        return x.round()
    return torch.empty_like(x).uniform_(generator=generator).add_(x).floor_()


def scale_of(x: Tensor, dim: int, highest: int) -> Tensor:
    """Return the grid step along `dim` (kept with size 1); where all is zero, the smallest positive number."""
    return x.abs().amax(dim, keepdim=True).div_(highest).clamp_min_(torch.finfo(x.dtype).tiny)


def int8_codes(x: Tensor, dim: int = -1, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Return codes (int8, shape of x) and scales (size 1 along `dim`); all elements along `dim` share a scale."""
    noise = None if generator is None else torch.empty_like(x).uniform_(generator=generator)
    return _int8_codes(x, dim, noise)


@fused
def _int8_codes(x: Tensor, dim: int, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute `int8_codes`, rounded stochastically by `noise`, which is uniform in [0, 1) and shaped like x."""
    scale = scale_of(x, dim, INT8)
    # Multiplied, because division takes several times as long; the grid is the same up to rounding.
    steps = x * scale.reciprocal()
    codes = steps.round() if noise is None else steps.add_(noise).floor_()
    return codes.clamp_(-INT8, INT8).to(torch.int8), scale


@fused
def scaled(product: Tensor, dtype: torch.dtype, rows: Tensor, columns: Tensor) -> Tensor:
    """Return a product of codes [m, n] as float numbers: times the scales of its rows [m, 1] and columns [1, n]."""
    return product.to(dtype).mul_(rows).mul_(columns)


def on_int8(x: Tensor, dim: int = -1, generator: torch.Generator | None = None) -> Tensor:
    """Round to the int8 grid: to the nearest value or, with a generator, to a random neighbour."""
    codes, scale = int8_codes(x, dim, generator)
    return codes.to(x.dtype) * scale


def int4_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes (int8) [out, groups, 32] and scales [out, groups, 1] of a weight [out, in], padded with 0."""
    groups = functional.pad(weight, (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    scale = scale_of(groups, -1, INT4)
    return (groups / scale).round_().clamp_(-INT4, INT4).to(torch.int8), scale


def from_int4(codes: Tensor, scale: Tensor, inputs: int) -> Tensor:
    """Return the weight [out, in] that int4 codes and scales stand for."""
    return (codes * scale).flatten(1)[:, :inputs]


def on_int4(weight: Tensor) -> Tensor:
    """Round a weight [out, in] to the int4 grid."""
    return from_int4(*int4_codes(weight), weight.shape[1])


def pack_int4(codes: Tensor) -> Tensor:
    """Pack two codes into a byte: int8 [out, groups, 32] to uint8 [out, groups, 16]."""
    low, high = (codes + 8).to(torch.uint8).chunk(2, -1)
    return low | high << 4


def unpack_int4(packed: Tensor) -> Tensor:
    """Unpack what `pack_int4` returned."""
    return torch.cat([packed & 15, packed >> 4], -1).to(torch.int8) - 8


def ternary_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes (int8) and scale (a scalar) of BitNet b1.58 (Ma et al. 2024, arXiv:2402.17764)."""
    scale = weight.abs().mean().clamp_min(TERNARY_EPS)
    return (weight / scale).round_().clamp_(-1, 1).to(torch.int8), scale


def to_bfloat16(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Round float32 to the nearest bfloat16 or, with a generator, stochastically so that the mean is x.

    bfloat16 is float32 without its last 16 bits: a random number of 16 bits is added before they are truncated.
    """
    if generator is None:
        return x.to(torch.bfloat16)
    noise = torch.randint(0, 1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    return _truncate_to_bfloat16(x.contiguous(), noise)


@fused
def _truncate_to_bfloat16(x: Tensor, noise: Tensor) -> Tensor:
    truncated = (x.view(torch.int32) + noise).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(x.isfinite(), truncated, x).to(torch.bfloat16)
