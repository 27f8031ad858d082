"""One bit per element, with error feedback (EF-signSGD: Karimireddy et al., ICML 2019; Seide et al., Interspeech 2014).

With the residual e of earlier steps and c = g + e, a rank sends the signs of c, eight to a byte, and the mean |c| of
each parameter as its scale; the receivers decode scale · sign(c), and what that leaves out is the next residual:

    e ← c - mean|c| · sign(c)

Under AdamW g is not the gradient but the momentum, into which this rank has blended its gradient (late.py, and
`freeze`), as in 1-bit Adam: it changes slowly, so its signs say more. Of all vectors with these signs and entries of
one magnitude, this scale gives the nearest. Without error feedback (signSGD, Bernstein et al., ICML 2018, here still
with the scale) the result is biased: small gradients count as much as large ones, and an entry that is always small
never gets its due.

Bytes that one of N ranks sends for n elements: (N-1) · (n/8 + 4 · scales).
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
    """EF-signSGD: send signs and a scale per parameter."""

    name = "sign"
    averages_momentum = True

    class Options(LateOptions):
        """Options of sign compression."""

        scale: Literal["parameter", "bucket"] = "parameter"
        """Which elements share a scale: those of a parameter or those of a bucket."""
        error_feedback: bool = True
        """Add what was left out to the next gradient."""

    def __init__(self, *arguments: Any) -> None:
        from labkit.gradients.compression.error_feedback import ErrorFeedback

        super().__init__(*arguments)
        self._errors = ErrorFeedback()

    def reduce_compressed(self, bucket: GradientBucket) -> InFlight:
        """Average the signs of all ranks, each multiplied by its scale."""
        import torch

        from labkit.gradients.compression.packing import join_bytes, pack, split_bytes, unpack

        flat, sizes = bucket.flat, _scale_sizes(self.options, bucket.sizes)
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
        """Describe the error-feedback buffers, if there are any."""
        return "what the signs have left out" if options.error_feedback else ""

    @classmethod
    def compressed_bytes(cls, options: Any, shapes: Sequence[Shape], context: CostContext) -> int:
        """Return (N-1) · (n/8 + 4 · scales) for n elements."""
        scales = 1 if options.scale == "bucket" else len(shapes)
        return all_gather_bytes(-(-numel(shapes) // 8) + 4 * scales, context.world_size)


def _scale_sizes(options: Any, sizes: list[int]) -> list[int]:
    """Return how many elements each scale is for."""
    return sizes if options.scale == "parameter" else [sum(sizes)]


def _scaled(flat: Tensor, scales: Tensor, sizes: list[int]) -> Tensor:
    """Multiply each slice of `flat` by its scale, in place, and return `flat`."""
    for part, scale in zip(flat.split(sizes), scales, strict=True):
        part.mul_(scale)
    return flat
