"""Eight bits with stochastic rounding (QSGD: Alistarh et al., NeurIPS 2017, with the largest magnitude as the scale).

With s levels and the scale m = max |x|, a rank sends for each element

    q = floor( s · x / m + u ),   u uniform in [0, 1)

and the receivers decode m · q / s. The expectation of q is s · x / m, so the mean over ranks is unbiased: no error
feedback is needed, and the error is noise that shrinks with the number of ranks. Ranks have different scales, so their
messages cannot be summed on the way: every rank gathers those of all others, and the bytes grow with the world size.

Bytes that one of N ranks sends for n elements: (N-1) · (n + 4 · scales); above 127 levels 2n instead of n.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from labkit.experiment.registry import Options as BaseOptions
from labkit.gradients.compression.compressor import Compressor, CostContext, GradientBucket, InFlight, Shape, numel
from labkit.gradients.cost import all_gather_bytes

if TYPE_CHECKING:
    import torch


class Int8(Compressor):
    """QSGD: round each element stochastically to one of a few levels and gather the levels of all ranks."""

    name = "int8"

    class Options(BaseOptions):
        """Options of int8 compression."""

        levels: int = Field(default=127, ge=1, le=32767)
        """Quantization levels between zero and the scale; above 127, each element takes 16 bits."""
        chunk: int = Field(default=0, ge=0, le=2**31 - 1)
        """Number of elements that share a scale; 0 for one scale per bucket."""

    def reduce(self, bucket: GradientBucket) -> InFlight:
        """Average the quantized gradients of all ranks."""
        import torch

        from labkit.gradients.compression.noise import row_abs_max, uniform
        from labkit.gradients.compression.packing import join_bytes, split_bytes

        flat, levels, dtype = bucket.flat, self.options.levels, self._dtype()
        rows = _scales(self.options, flat.numel())
        width = -(-flat.numel() // rows)
        table = flat.new_zeros(rows, width)
        table.view(-1)[: flat.numel()] = flat
        scales = row_abs_max(table).float()
        steps = table.mul_((levels / torch.where(scales > 0, scales, 1)).to(flat.dtype))
        noise = uniform(steps, self.generator(bucket))
        # Just below the highest level the sum may be rounded up to the next integer.
        codes = steps.add_(noise).floor_().clamp_(-levels, levels).to(dtype)
        pending = self.comm.all_gather(join_bytes(scales, codes.view(-1)[: flat.numel()]))
        yield
        out = flat.new_zeros(rows, width)
        for message in pending.wait():
            scales, codes = split_bytes(message, [(rows, torch.float32), (flat.numel(), dtype)])
            table.view(-1)[: flat.numel()] = codes
            out += table * (scales / (levels * self.comm.size)).to(flat.dtype)[:, None]
        return out.view(-1)[: flat.numel()]

    def _dtype(self) -> torch.dtype:
        import torch

        return torch.int8 if self.options.levels <= 127 else torch.int16

    @classmethod
    def bucket_bytes(cls, options: Any, shapes: Sequence[Shape], context: CostContext) -> int:
        """Return (N-1) · (n + 4 · scales) for n elements."""
        count = numel(shapes)
        width = 1 if options.levels <= 127 else 2
        return all_gather_bytes(width * count + 4 * _scales(options, count), context.world_size)


def _scales(options: Any, count: int) -> int:
    return -(-count // options.chunk) if options.chunk else 1
