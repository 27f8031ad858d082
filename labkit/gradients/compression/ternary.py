"""Minus one, zero or one (TernGrad: Wen et al., NeurIPS 2017): two bits per element.

With the largest magnitude m = max |g| of a parameter, a rank sends m and, for each element, its sign with probability
|g|/m and zero otherwise. The expectation is g, so no error feedback is needed; but the noise is large where one element
is far above the others. So, as in the paper, gradients are first clipped to c standard deviations of their parameter;
that biases the result where it clips, and c = 0 turns it off.

Bytes that one of N ranks sends for n elements: (N-1) · (n/4 + 4 · parameters).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from labkit.gradients.compression.compressor import CostContext, GradientBucket, InFlight, Shape, numel
from labkit.gradients.compression.late import LateCompressor, LateOptions
from labkit.gradients.cost import all_gather_bytes


class Ternary(LateCompressor):
    """TernGrad: send each element as its stochastically rounded sign, and a scale per parameter."""

    name = "ternary"

    class Options(LateOptions):
        """Options of ternary compression."""

        clip_sigma: float = Field(default=2.5, ge=0, le=100)
        """Clip gradients to this many standard deviations of their parameter; 0 for no clipping (unbiased)."""

    def reduce_compressed(self, bucket: GradientBucket) -> InFlight:
        """Average the ternary gradients of all ranks."""
        import torch

        from labkit.gradients.compression.noise import row_abs_max, uniform
        from labkit.gradients.compression.packing import join_bytes, pack, packed_bytes, split_bytes, unpack

        flat, sizes = bucket.flat, bucket.sizes
        parts = flat.split(sizes)
        if self.options.clip_sigma:
            for part in parts:
                limit = part.square().mean().sqrt_().mul_(self.options.clip_sigma)
                part.clamp_(-limit, limit)
        scales = torch.cat([row_abs_max(part[None])[0] for part in parts]).float()
        noise = uniform(flat, self.generator(bucket))
        for part, scale in zip(noise.split(sizes), scales, strict=True):
            part.mul_(scale)
        digits = (flat > noise).byte() + 2 * (flat < -noise).byte()
        pending = self.comm.all_gather(join_bytes(scales, pack(digits, 2)))
        yield
        out = flat.zero_()
        for message in pending.wait():
            scales, packed = split_bytes(
                message, [(len(sizes), torch.float32), (packed_bytes(len(flat), 2), torch.uint8)]
            )
            values = unpack(packed, len(flat), (0.0, 1.0, -1.0, 0.0), flat.dtype)
            for part, scale in zip(values.split(sizes), scales / self.comm.size, strict=True):
                part.mul_(scale)
            out += values
        return out

    @classmethod
    def compressed_bytes(cls, options: Any, shapes: Sequence[Shape], context: CostContext) -> int:
        """Return (N-1) · (n/4 + 4 · parameters) for n elements."""
        return all_gather_bytes(-(-numel(shapes) // 4) + 4 * len(shapes), context.world_size)
