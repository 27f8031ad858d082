"""1-bit Adam (Tang et al., ICML 2021): AdamW whose momentum is averaged with one bit per element.

Signs do not suit Adam: it divides by the root of the mean squares of its input, and those of signs are all equal. But
the mean squares soon stop changing. So it is plain AdamW with uncompressed gradients for `warmup_steps`; then the mean
squares v are frozen, and ranks average the momentum, into which each has blended its own gradient:

    m ← mean( β·m + (1-β)·g ),   then   w ← w - rate · m / (√v + ε)

The mean is sent as signs with a scale, in two rounds: rank j gets shard j of all ranks (all-to-all), averages it, and
sends the signs of the mean to all (all-gather), with error feedback in both rounds. So the bytes do not grow with the
world size, as those of gathered signs do.

Here signs are taken of m / (√v + ε), which is linear in m, so that the scale is that of the weight update, and a weight
with small gradients does not move by the scale of the others. A weight with hardly any gradient during the warm-up has
a tiny denominator: those far below the root mean square of their parameter's denominators are raised
(`frozen_adamw.FLOOR`).

After the warm-up `optimizer.clip_norm` limits the norm of the averaged momentum.

Bytes that one of N ranks sends for n elements after the warm-up: 2·(N-1) · (n/8N + 4·c), with c = ⌈n/1024N⌉ chunks that
have a scale each, and n/N rounded up so that chunks have one size and their signs fill bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from labkit.experiment.problem import Problem
from labkit.experiment.registry import Options as BaseOptions
from labkit.gradients.compression.compressor import (
    CostContext,
    GradientBucket,
    InFlight,
    Shape,
    numel,
    resolve_start_step,
)
from labkit.gradients.compression.late import LateCompressor
from labkit.gradients.cost import all_gather_bytes, all_to_all_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from labkit.experiment import Experiment
    from labkit.experiment.machine import Machine


CHUNK = 1024
"""Maximum number of elements that share a scale."""


class OneBitAdam(LateCompressor):
    """1-bit Adam: average the momentum of AdamW as signs, with error feedback in both rounds."""

    name = "onebit_adam"
    averages_momentum = True

    class Options(BaseOptions):
        """Options of 1-bit Adam."""

        warmup_steps: int | None = Field(default=None, ge=1, le=10_000_000)
        """Optimizer steps of plain AdamW before its second moments are frozen; empty: a twentieth of the training."""

        @property
        def freeze(self) -> bool:
            """Always true: 1-bit Adam is defined by freezing Adam's second moment."""
            return True

    def __init__(self, *arguments: Any) -> None:
        from labkit.gradients.compression.error_feedback import ErrorFeedback

        super().__init__(*arguments)
        self._own_errors, self._sum_errors = ErrorFeedback(), ErrorFeedback()

    def reduce_compressed(self, bucket: GradientBucket) -> InFlight:
        """Average the momentum, which is in units of √v like everything here."""
        import torch

        from labkit.gradients.compression.packing import pack_signs, unpack_signs

        flat, world_size, count = bucket.flat, self.comm.size, bucket.flat.numel()
        error, (chunks, width) = self._own_errors.of(bucket), _chunks(count, world_size)
        padded = flat.new_zeros(world_size * chunks, width)
        padded.view(-1)[:count] = flat.add_(error)
        message = pack_signs(padded)
        exchanged = self.comm.all_to_all(message.view(world_size, -1))
        torch.sub(flat, unpack_signs(message, width, flat.dtype).view(-1)[:count], out=error)
        yield
        shards = unpack_signs(exchanged.wait().view(len(message), -1), width, flat.dtype)
        mean = shards.view(world_size, chunks, width).mean(0)
        error = self._sum_errors.of(_shard_bucket(bucket, mean.view(-1))).view_as(mean)
        message = pack_signs(mean.add_(error))
        gathered = self.comm.all_gather(message)
        torch.sub(mean, unpack_signs(message, width, flat.dtype), out=error)
        yield
        return unpack_signs(gathered.wait().flatten(0, 1), width, flat.dtype).view(-1)[:count]

    @classmethod
    def describe_local_state(cls, options: Any) -> str:
        """Describe the error-feedback buffers."""
        return "what the signs have left out in both rounds"

    @classmethod
    def compressed_bytes(cls, options: Any, shapes: Sequence[Shape], context: CostContext) -> int:
        """Return 2·(N-1) · (n/8N + 4·n/1024N) for n elements."""
        chunks, width = _chunks(numel(shapes), context.world_size)
        shard = chunks * (4 + width // 8)
        return all_to_all_bytes(shard * context.world_size, context.world_size) + all_gather_bytes(
            shard, context.world_size
        )

    @classmethod
    def problems(cls, experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield the reasons why it cannot run: it requires AdamW on plain data-parallel replicas."""
        yield from super().problems(experiment, machine)
        field = "gradients.compression.method"
        if experiment.optimizer.name != "adamw":
            yield Problem("optimizer.name", "1-bit Adam averages the momentum of AdamW", "adamw")
        if experiment.gradients.hierarchical:
            yield Problem(field, "between hosts a rank has a slice of all gradients, without their momentum", "none")
        if experiment.layout.pp > 1:
            reason = "stages sum the gradients of weights that they share, but momenta cannot be summed"
            yield Problem(field, reason, "none")

    @classmethod
    def first_compressed_step(cls, options: Any, steps: int) -> int:
        """Return the first optimizer step (from 0) with a compressed momentum."""
        return resolve_start_step(options.warmup_steps, steps, 0.05)


def _chunks(count: int, world_size: int) -> tuple[int, int]:
    """Return how many chunks each rank averages and how many elements a chunk has, a multiple of 8."""
    shard = -(-count // world_size)
    chunks = -(-shard // CHUNK)
    return chunks, -(-shard // (8 * chunks)) * 8


def _shard_bucket(bucket: GradientBucket, mean: Tensor) -> GradientBucket:
    """Return a bucket for the shard that this rank averages, which may begin and end within a parameter."""
    key = tuple(map(id, bucket.parameters))
    return GradientBucket(mean, (key,), (tuple(mean.shape),), bucket.step, bucket.index)
