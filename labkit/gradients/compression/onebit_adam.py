"""1-bit Adam (Tang et al., ICML 2021): AdamW whose momentum is averaged with one bit a number.

Signs do not suit Adam: it divides by the root of the mean squares of what it is given, and those of signs are all
alike. But the mean squares soon stop changing. So it is plain AdamW with whole gradients for `warmup_steps`; then the
mean squares v are frozen, and what ranks average is the momentum, each with its own gradient in it:

    m ← mean( β·m + (1-β)·g ),   then   w ← w - rate · m / (√v + ε)

averaged as signs with a scale, with error feedback, in two rounds: rank j gets the j-th part of everyone (all-to-all),
averages, and sends signs of the mean to all (all-gather), with error feedback on both sides. So the bytes do not grow
with the number of ranks as those of gathered signs do.

Here signs are taken of m / (√v + ε), which is linear in m, so that the scale is that of the update, and a weight whose
gradients are small is not pushed about by the scale of the others. What was hardly touched in the warm-up has hardly
a denominator: those far below the root mean square of their parameter's are raised (`frozen_adamw.FLOOR`).

What `optimizer.clip_norm` limits after the warm-up is the norm of the averaged momentum.

Bytes that one of N ranks sends for n numbers after the warm-up: 2·(N-1) · (n/8N + 4·c), with c = ⌈n/1024N⌉ chunks that
have a scale each, and n/N rounded up so that chunks are alike and their signs fill bytes.
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
"""Most numbers that share a scale."""


class OneBitAdam(LateCompressor):
    """1-bit Adam."""

    name = "onebit_adam"
    averages_momentum = True

    class Options(BaseOptions):
        """When it begins."""

        warmup_steps: int | None = Field(default=None, ge=1, le=10_000_000)
        """Updates of plain AdamW before the mean squares are frozen; empty for a twentieth of the training."""

        @property
        def freeze(self) -> bool:
            """That is what it is."""
            return True

    def __init__(self, *arguments: Any) -> None:
        from labkit.gradients.compression.error_feedback import ErrorFeedback

        super().__init__(*arguments)
        self._own_errors, self._sum_errors = ErrorFeedback(), ErrorFeedback()

    def reduce_compressed(self, bucket: GradientBucket) -> InFlight:
        """The mean momentum, as everything here in units of √v."""
        import torch

        from labkit.gradients.compression.packing import pack_signs, unpack_signs

        flat, world_size, count = bucket.flat, self.comm.size, bucket.flat.numel()
        error, (chunks, width) = self._own_errors.of(bucket), _chunks(count, world_size)
        parts = flat.new_zeros(world_size * chunks, width)
        parts.view(-1)[:count] = flat.add_(error)
        message = pack_signs(parts)
        dealt = self.comm.all_to_all(message.view(world_size, -1))
        torch.sub(flat, unpack_signs(message, width, flat.dtype).view(-1)[:count], out=error)
        yield
        arrived = unpack_signs(dealt.wait().view(len(message), -1), width, flat.dtype)
        mean = arrived.view(world_size, chunks, width).mean(0)
        error = self._sum_errors.of(_place(bucket, mean.view(-1))).view_as(mean)
        message = pack_signs(mean.add_(error))
        gathered = self.comm.all_gather(message)
        torch.sub(mean, unpack_signs(message, width, flat.dtype), out=error)
        yield
        return unpack_signs(gathered.wait().flatten(0, 1), width, flat.dtype).view(-1)[:count]

    @classmethod
    def describe_local_state(cls, options: Any) -> str:
        """In words."""
        return "what the signs have left out on both sides"

    @classmethod
    def compressed_bytes(cls, options: Any, shapes: Sequence[Shape], context: CostContext) -> int:
        """2·(N-1) · (n/8N + 4·n/1024N)."""
        chunks, width = _chunks(numel(shapes), context.world_size)
        part = chunks * (4 + width // 8)
        return all_to_all_bytes(part * context.world_size, context.world_size) + all_gather_bytes(
            part, context.world_size
        )

    @classmethod
    def problems(cls, experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """It is a way of doing AdamW."""
        yield from super().problems(experiment, machine)
        field = "gradients.compression.method"
        if experiment.optimizer.name != "adamw":
            yield Problem("optimizer.name", "1-bit Adam averages the momentum of AdamW", "adamw")
        if experiment.gradients.hierarchical:
            yield Problem(field, "between hosts a rank has a stretch of all gradients, without their momentum", "none")
        if experiment.layout.pp > 1:
            reason = "stages add up the gradients of weights that they share, and momenta do not add up"
            yield Problem(field, reason, "none")

    @classmethod
    def first_compressed_step(cls, options: Any, steps: int) -> int:
        """The first update with compression."""
        return resolve_start_step(options.warmup_steps, steps, 0.05)


def _chunks(count: int, world_size: int) -> tuple[int, int]:
    """How many chunks with a scale each rank averages, and how many numbers are in one: signs in whole bytes."""
    part = -(-count // world_size)
    chunks = -(-part // CHUNK)
    return chunks, -(-part // (8 * chunks)) * 8


def _place(bucket: GradientBucket, mean: Tensor) -> GradientBucket:
    """The part that this rank averages, which is its own whatever the borders of parameters."""
    key = tuple(map(id, bucket.parameters))
    return GradientBucket(mean, (key,), (tuple(mean.shape),), bucket.step, bucket.number)
