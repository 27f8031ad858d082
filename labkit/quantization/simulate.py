"""Simulation of weights with fewer and fewer bits, for teaching.

It is emulated: weights are rounded to a grid, but they are stored and multiplied in float32. Loss and accuracy are
meaningful, speed and memory are not.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from labkit.quantization.codes import rounded, scale_of
from labkit.quantization.linear import chosen

MOST_BITS = 8
"""Maximum number of bits that can be simulated."""


@dataclass(frozen=True)
class Simulated:
    """A copy of a network whose weights have few bits."""

    model: nn.Module
    bits: int
    layers: tuple[str, ...]
    """Names of the layers whose weights were rounded."""
    error: float
    """Root mean square of the rounding error, relative to that of the weights."""
    badge: str = "emulated"
    """Label for figures: rounded values are stored in float32."""


def with_bits(weight: Tensor, bits: int) -> Tensor:
    """Return a weight [out, in] rounded to 2^bits - 1 values per row around zero.

    One bit gives sign(w) · mean |w|, the best fit of a row (Rastegari et al. 2016, XNOR-Net, arXiv:1603.05279).
    Raises ValueError for bits outside 1 to 8.
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
    """Return a copy of `model` whose linear layers have weights of `bits` bits, 1 to 8 (emulated in float32).

    The last linear layer is not changed unless `head`. Raises ValueError for other bits.
    """
    copy = deepcopy(model)
    layers = chosen(copy, head)
    error = total = 0.0
    for _, layer in layers:
        quantized = with_bits(layer.weight, bits)
        error += float((quantized - layer.weight).square().sum())
        total += float(layer.weight.square().sum())
        layer.weight.copy_(quantized)
    return Simulated(copy, bits, tuple(name for name, _ in layers), (error / total) ** 0.5 if total else 0.0)
