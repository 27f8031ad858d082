"""What a network loses with fewer and fewer bits: weights rounded to a grid, for teaching.

Emulated: the numbers are those of the grid, but they lie in float32 memory and are multiplied in float32. Speed and
memory mean nothing here; loss and accuracy do.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from labkit.quantization.codes import rounded, scale_of
from labkit.quantization.linear import chosen

MOST_BITS = 8


@dataclass(frozen=True)
class Simulated:
    """A copy of a network with weights of few bits."""

    model: nn.Module
    bits: int
    layers: tuple[str, ...]
    """Whose weights were rounded."""
    error: float
    """Root of the mean squared rounding error, relative to that of the weights."""
    badge: str = "emulated"
    """Rounded numbers in float32 memory."""


def with_bits(weight: Tensor, bits: int) -> Tensor:
    """The weight [out, in] rounded to 2^bits - 1 numbers a row around zero; with one bit to ± the row's mean magnitude.

    One bit: sign(w) · mean |w|, the best fit of such a row (Rastegari et al. 2016, XNOR-Net, arXiv:1603.05279).
    ValueError for bits outside 1 to 8.
    """
    if not 1 <= bits <= MOST_BITS:
        raise ValueError(f"weights can be simulated with 1 to {MOST_BITS} bits, got {bits}")
    if bits == 1:
        return torch.where(weight < 0, -1.0, 1.0) * weight.abs().mean(-1, keepdim=True)
    highest = 2 ** (bits - 1) - 1
    scale = scale_of(weight, -1, highest)
    return rounded(weight / scale).clamp_(-highest, highest) * scale


@torch.no_grad()
def simulate(model: nn.Module, bits: int, head: bool = False) -> Simulated:
    """A copy of `model` whose linear layers have weights of `bits` bits, 1 to 8 (emulated in float32).

    The last linear layer stays as it is unless `head`. ValueError for other bits.
    """
    copy = deepcopy(model)
    layers = chosen(copy, head)
    lost = whole = 0.0
    for _, layer in layers:
        seen = with_bits(layer.weight, bits)
        lost += float((seen - layer.weight).square().sum())
        whole += float(layer.weight.square().sum())
        layer.weight.copy_(seen)
    return Simulated(copy, bits, tuple(name for name, _ in layers), (lost / whole) ** 0.5 if whole else 0.0)
