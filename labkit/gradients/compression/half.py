"""Gradients in 16 bits: half the bytes of float32.

fp16 has 11 bits of mantissa and ends at 65,504: a gradient beyond that becomes infinite. bf16 has 8 bits and the range
of float32. Gradients are sent and summed in that format, as torch's own compression hooks do (they refuse bf16 on
gloo); but a sum in 16 bits is rounded on every rank that it passes. With `sum_in: fp32` ranks exchange shards
(all-to-all), sum them in float32, round once and gather the result: the same bytes, a better sum.

Bytes that one of N ranks sends for n elements: 2·(N-1)/N · 2n either way (with fp32, n is rounded up to a multiple of
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
    """Base class of the fp16 and bf16 compressors: cast each bucket to 16 bits and all-reduce it."""

    class Options(BaseOptions):
        """Options of both 16-bit formats."""

        sum_in: Literal["half", "fp32"] = "half"
        """Precision in which the gradients of all ranks are summed; the number of bytes sent is the same."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which gradients are sent."""
        import torch

        return torch.float16 if self.name == "fp16" else torch.bfloat16

    def reduce(self, bucket: GradientBucket) -> InFlight:
        """Average a bucket; the mean is rounded to 16 bits."""
        return self._sum_in_fp32(bucket) if self.options.sum_in == "fp32" else self._sum_in_half(bucket)

    def _sum_in_half(self, bucket: GradientBucket) -> InFlight:
        # Divided first: the sum over the ranks could leave the range of fp16 even if the gradients do not.
        pending = self.comm.all_reduce((bucket.flat / self.comm.size).to(self.dtype))
        yield
        return bucket.flat.copy_(pending.wait())

    def _sum_in_fp32(self, bucket: GradientBucket) -> InFlight:
        flat, world_size = bucket.flat, self.comm.size
        shards = flat.new_zeros(world_size, -(-flat.numel() // world_size), dtype=self.dtype)
        shards.view(-1)[: flat.numel()] = flat
        exchanged = self.comm.all_to_all(shards)
        yield
        mean = exchanged.wait().to(flat.dtype).mean(0).to(self.dtype)
        gathered = self.comm.all_gather(mean)
        yield
        return flat.copy_(gathered.wait().view(-1)[: flat.numel()])

    @classmethod
    def bucket_bytes(cls, options: Any, shapes: Sequence[Shape], context: CostContext) -> int:
        """Return 2·(N-1)/N · 2n for n elements."""
        count, world_size = numel(shapes), context.world_size
        if options.sum_in == "half":
            return all_reduce_bytes(2 * count, world_size)
        shard = -(-count // world_size)
        return all_to_all_bytes(2 * shard * world_size, world_size) + all_gather_bytes(2 * shard, world_size)


class Fp16(Half):
    """Compressor to IEEE half precision."""

    name = "fp16"


class Bf16(Half):
    """Compressor to bfloat16."""

    name = "bf16"
