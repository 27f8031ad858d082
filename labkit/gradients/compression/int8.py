"""Eight bits with stochastic rounding (QSGD: Alistarh et al., NeurIPS 2017, with the greatest value as the scale).

With s levels and the scale m = max |x| a rank sends, of each number,

    q = floor( s · x / m + u ),   u uniform in [0, 1)

and the receivers read m · q / s. The expectation of q is s · x / m, so the mean over ranks is unbiased: no memory is
needed, and the error is noise that shrinks with the number of ranks. Everyone needs the numbers of everyone, with
scales of their own, so they are gathered, not added up on the way: more ranks, more bytes.

Bytes that one of N ranks sends for n numbers: (N-1) · (n + 4 · scales), twice n above 127 levels.
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
    """QSGD."""

    name = "int8"

    class Options(BaseOptions):
        """How fine the steps are."""

        levels: int = Field(default=127, ge=1, le=32767)
        """Steps between zero and the scale; above 127 a number takes 16 bits."""
        chunk: int = Field(default=0, ge=0, le=2**31 - 1)
        """Numbers that share a scale; 0 for a scale per bucket."""

    def reduce(self, bucket: GradientBucket) -> InFlight:
        """The mean of the rounded gradients."""
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
        # Close to the greatest level the sum may be rounded up to the next whole number.
        whole = steps.add_(noise).floor_().clamp_(-levels, levels).to(dtype)
        pending = self.comm.all_gather(join_bytes(scales, whole.view(-1)[: flat.numel()]))
        yield
        out = flat.new_zeros(rows, width)
        for message in pending.wait():
            scales, numbers = split_bytes(message, [(rows, torch.float32), (flat.numel(), dtype)])
            table.view(-1)[: flat.numel()] = numbers
            out += table * (scales / (levels * self.comm.size)).to(flat.dtype)[:, None]
        return out.view(-1)[: flat.numel()]

    def _dtype(self) -> torch.dtype:
        import torch

        return torch.int8 if self.options.levels <= 127 else torch.int16

    @classmethod
    def bucket_bytes(cls, options: Any, shapes: Sequence[Shape], context: CostContext) -> int:
        """(N-1) · (n + 4 · scales)."""
        count = numel(shapes)
        width = 1 if options.levels <= 127 else 2
        return all_gather_bytes(width * count + 4 * _scales(options, count), context.world_size)


def _scales(options: Any, count: int) -> int:
    return -(-count // options.chunk) if options.chunk else 1
