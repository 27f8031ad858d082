"""One bit a number, with error feedback (EF-signSGD: Karimireddy et al., ICML 2019; Seide et al., Interspeech 2014).

With the error e that is left from before, a rank sends of c = g + e the signs, eight to a byte, and the mean |c| of
each parameter as its scale; the receivers read scale · sign(c), and what that leaves out is the next error:

    e ← c - mean|c| · sign(c)

Under AdamW c is the momentum with this rank's gradient in it instead of the gradient (late.py, and `freeze`), as in
1-bit Adam: it changes slowly, so its signs say more. The scale makes this the nearest of all vectors of one size and
these signs. Without error feedback (signSGD, Bernstein et al., ICML 2018, here still with the scale) the result is
biased: small gradients count as much as large ones, and what is always small is never heard.

Bytes that one of N ranks sends for n numbers: (N-1) · (n/8 + 4 · scales).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from labkit.gradients.compression.compressor import CostContext, GradientBucket, InFlight, Shape, numel
from labkit.gradients.compression.late import LateCompressor, LateOptions
from labkit.gradients.cost import all_gather_bytes

if TYPE_CHECKING:
    from torch import Tensor


class Sign(LateCompressor):
    """EF-signSGD."""

    name = "sign"
    averages_momentum = True

    class Options(LateOptions):
        """What has a scale of its own, and what becomes of the rest."""

        scale: Literal["parameter", "bucket"] = "parameter"
        """What shares one magnitude."""
        error_feedback: bool = True
        """What was cut off is added to the next gradient."""

    def __init__(self, *arguments: Any) -> None:
        from labkit.gradients.compression.error_feedback import ErrorFeedback

        super().__init__(*arguments)
        self._errors = ErrorFeedback()

    def reduce_compressed(self, bucket: GradientBucket) -> InFlight:
        """The mean of the signs, each times its scale."""
        import torch

        from labkit.gradients.compression.packing import join_bytes, pack, split_bytes, unpack

        flat, sizes = bucket.flat, _stretches(self.options, bucket.sizes)
        if self.options.error_feedback:
            flat.add_(self._errors.of(bucket))
        scales = torch.stack([part.mean() for part in flat.abs().split(sizes)]).float()
        negative = flat.signbit()
        pending = self.comm.all_gather(join_bytes(scales, pack(negative, 1)))
        if self.options.error_feedback:
            sent = _scaled(torch.ones_like(flat).copysign_(flat), scales, sizes)
            torch.sub(flat, sent, out=self._errors.of(bucket))
        yield
        out = flat.zero_()
        for message in pending.wait():
            scales, bits = split_bytes(message, [(len(sizes), torch.float32), (-(-flat.numel() // 8), torch.uint8)])
            out += _scaled(unpack(bits, flat.numel(), (1.0, -1.0), flat.dtype), scales / self.comm.size, sizes)
        return out

    @classmethod
    def describe_local_state(cls, options: Any) -> str:
        """In words."""
        return "what the signs have left out" if options.error_feedback else ""

    @classmethod
    def compressed_bytes(cls, options: Any, shapes: Sequence[Shape], context: CostContext) -> int:
        """(N-1) · (n/8 + 4 · scales)."""
        scales = 1 if options.scale == "bucket" else len(shapes)
        return all_gather_bytes(-(-numel(shapes) // 8) + 4 * scales, context.world_size)


def _stretches(options: Any, sizes: list[int]) -> list[int]:
    """How many numbers each scale is for."""
    return sizes if options.scale == "parameter" else [sum(sizes)]


def _scaled(flat: Tensor, scales: Tensor, sizes: list[int]) -> Tensor:
    """Each stretch of `flat` times its scale, in place."""
    for part, scale in zip(flat.split(sizes), scales, strict=True):
        part.mul_(scale)
    return flat
