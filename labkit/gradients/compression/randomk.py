"""Random entries, the same on all ranks (Stich et al., "Sparsified SGD with Memory", NeurIPS 2018).

All ranks draw the same places from a common seed, so that only values travel and can be added up on the way, by an
all-reduce, whatever the number of ranks. Either what was not sent is forgotten and what is sent is made n/k times
larger, which is right on average but noisy; or it is kept for later (error feedback). The paper has the latter; but an
entry then waits for n/k updates whatever its size, and short trainings at high learning rates bear noise better than
so much delay: the language recipe ends 6 % above the loss without compression at a ratio of 1/4 and 19 % with feedback.

The places are every s-th of the bucket, round and round from a random one, s random without a common divisor with n: k
different places, each as likely as any other, without shuffling all n.

Bytes that one of N ranks sends for n numbers: 2·(N-1)/N · k · bytes of a number, k = ⌈ratio · n⌉.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from labkit.gradients.compression.compressor import CostContext, GradientBucket, InFlight, Shape, numel
from labkit.gradients.compression.late import LateCompressor, LateOptions
from labkit.gradients.cost import all_reduce_bytes

if TYPE_CHECKING:
    from torch import Tensor


class RandomK(LateCompressor):
    """Random-k."""

    name = "randomk"

    class Options(LateOptions):
        """How much is sent, and what becomes of the rest."""

        ratio: float = Field(default=0.5, gt=0, le=1)
        """Which part of the entries of a bucket is sent."""
        error_feedback: bool = False
        """Keep what was not sent for later, instead of making what is sent larger."""

    def __init__(self, *arguments: Any) -> None:
        from labkit.gradients.compression.error_feedback import ErrorFeedback

        super().__init__(*arguments)
        self._errors = ErrorFeedback()

    def reduce_compressed(self, bucket: GradientBucket) -> InFlight:
        """The mean at the drawn places, zero elsewhere."""
        flat = bucket.flat
        count = _count(self.options, flat.numel())
        places = draw_indices(flat.numel(), count, self.generator(bucket, shared=True))
        if self.options.error_feedback:
            flat = self._errors.of(bucket).add_(flat)
        scale = 1 if self.options.error_feedback else flat.numel() / count
        pending = self.comm.all_reduce(flat[places] * (scale / self.comm.size))
        if self.options.error_feedback:
            flat[places] = 0
        yield
        out = bucket.flat.zero_()
        out[places] = pending.wait()
        return out

    @classmethod
    def describe_local_state(cls, options: Any) -> str:
        """In words."""
        return "what it has not sent yet" if options.error_feedback else ""

    @classmethod
    def compressed_bytes(cls, options: Any, shapes: Sequence[Shape], context: CostContext) -> int:
        """2·(N-1)/N · k · bytes of a number."""
        return all_reduce_bytes(_count(options, numel(shapes)) * context.itemsize, context.world_size)


def _count(options: Any, size: int) -> int:
    return max(1, math.ceil(options.ratio * size))


def draw_indices(size: int, count: int, generator: Any) -> Tensor:
    """`count` different places below `size`, int64."""
    import torch

    start, stride = torch.randint(size, (2,), generator=generator, device=generator.device).tolist()
    while math.gcd(stride, size) != 1:
        stride += 1
    return (start + stride * torch.arange(count, device=generator.device)) % size
