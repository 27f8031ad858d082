"""Gradients in 16 bits: half the bytes of float32.

fp16 has 11 bits of mantissa and ends at 65,504: a gradient beyond that becomes infinite. bf16 has 8 bits and the range
of float32. Sent and added up so, as torch's own compression hooks do (they refuse bf16 on gloo); but adding up in 16
bits rounds at every rank on the way. With `sum_in: fp32` parts are dealt out (all-to-all), added up in float32, rounded
once and gathered: the same bytes, a better sum.

Bytes that one of N ranks sends for n numbers: 2·(N-1)/N · 2n, by either way (with fp32, n rounded up to a multiple of
N).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from labkit.experiment.registry import Options as BaseOptions
from labkit.gradients.compression.compressor import Compressor, CostContext, GradientBucket, InFlight, Shape, numel
from labkit.gradients.cost import all_gather_bytes, all_reduce_bytes, all_to_all_bytes

if TYPE_CHECKING:
    import torch


class Half(Compressor):
    """What both formats do."""

    class Options(BaseOptions):
        """How ranks are added up."""

        sum_in: Literal["half", "fp32"] = "half"
        """The number format in which ranks are added up; the bytes are the same."""

    @property
    def dtype(self) -> torch.dtype:
        """The format in which numbers travel."""
        import torch

        return torch.float16 if self.name == "fp16" else torch.bfloat16

    def reduce(self, bucket: GradientBucket) -> InFlight:
        """The mean, rounded to 16 bits."""
        return self._dealt_out(bucket) if self.options.sum_in == "fp32" else self._added_up(bucket)

    def _added_up(self, bucket: GradientBucket) -> InFlight:
        # Divided first: the sum of the ranks could leave the range of fp16 where no rank does.
        pending = self.comm.all_reduce((bucket.flat / self.comm.size).to(self.dtype))
        yield
        return bucket.flat.copy_(pending.wait())

    def _dealt_out(self, bucket: GradientBucket) -> InFlight:
        flat, world_size = bucket.flat, self.comm.size
        parts = flat.new_zeros(world_size, -(-flat.numel() // world_size), dtype=self.dtype)
        parts.view(-1)[: flat.numel()] = flat
        dealt = self.comm.all_to_all(parts)
        yield
        mean = dealt.wait().to(flat.dtype).mean(0).to(self.dtype)
        gathered = self.comm.all_gather(mean)
        yield
        return flat.copy_(gathered.wait().view(-1)[: flat.numel()])

    @classmethod
    def bucket_bytes(cls, options: Any, shapes: Sequence[Shape], context: CostContext) -> int:
        """2·(N-1)/N · 2n."""
        count, world_size = numel(shapes), context.world_size
        if options.sum_in == "half":
            return all_reduce_bytes(2 * count, world_size)
        part = -(-count // world_size)
        return all_to_all_bytes(2 * part * world_size, world_size) + all_gather_bytes(2 * part, world_size)


class Fp16(Half):
    """IEEE half precision."""

    name = "fp16"


class Bf16(Half):
    """Brain half precision."""

    name = "bf16"
