"""The largest entries, with error feedback (Deep Gradient Compression: Lin et al., ICLR 2018).

A rank adds what it has not sent before to its gradient, sends index and value of the k entries of largest magnitude in
each bucket, and keeps the others for later. To find them it estimates a threshold from a sample and sorts only what is
above it, so that exactly the k largest are sent without sorting everything.

`momentum_correction` is for SGD with momentum m: the velocity u ← m·u + g is accumulated and sent instead of the
gradient, and is reset to zero where it was sent; the optimizer then adds no momentum of its own. So a gradient that
waits accumulates the same momentum as one that does not. In the first steps more is sent: the ratio falls from 1/4 to
its value, exponentially.

At a ratio of 1 % an entry waits about a hundred steps. That does not matter in a training of many thousands of steps,
which the paper is about; it does in one of a few hundred, hence the default.

Bytes that one of N ranks sends for n elements: (N-1) · k · (4 + bytes of a value), k = ⌈ratio · n⌉.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from labkit.experiment.problem import Problem
from labkit.gradients.compression.compressor import (
    CostContext,
    GradientBucket,
    InFlight,
    Shape,
    numel,
    resolve_start_step,
)
from labkit.gradients.compression.late import LateCompressor, LateOptions
from labkit.gradients.cost import all_gather_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from labkit.experiment import Experiment, Optimizer
    from labkit.experiment.machine import Machine

FIRST_RATIO = 0.25
"""Ratio in the first step of a warm-up."""
SAMPLE = 0.01
"""Fraction of the entries from which the threshold is estimated."""
LEAST_SAMPLE = 4096
"""Minimum number of entries in the sample."""
MARGIN = 1.3
"""MARGIN · k entries are expected above the estimated threshold, so that fewer than k are rare."""


class TopK(LateCompressor):
    """Deep Gradient Compression: send the largest entries of a bucket and keep the rest for later."""

    name = "topk"

    class Options(LateOptions):
        """Options of top-k."""

        ratio: float = Field(default=0.15, gt=0, le=1)
        """Fraction of the entries of a bucket that is sent."""
        warmup_steps: int | None = Field(default=None, ge=0, le=10_000_000)
        """First steps, during which the ratio falls from 0.25 to its value; empty for a fifth of the training."""
        values: Literal["fp32", "fp16"] = "fp32"
        """Dtype in which values are sent (fp32: that of the gradient); the rounding error is kept for later."""
        error_feedback: bool = True
        """Add what was not sent to the next gradient."""
        momentum_correction: bool = False
        """Accumulate the velocity of SGD with momentum instead of the gradient."""

    def __init__(self, *arguments: Any) -> None:
        from labkit.gradients.compression.error_feedback import ErrorFeedback

        super().__init__(*arguments)
        self._errors, self._velocities = ErrorFeedback(), ErrorFeedback()
        self._momentum = 0.0

    def reduce(self, bucket: GradientBucket) -> InFlight:
        """Average the gradients or, with momentum correction, the velocities."""
        if self.options.momentum_correction:
            velocity = self._velocities.of(bucket)
            bucket.flat.copy_(velocity.mul_(self._momentum).add_(bucket.flat))
        return super().reduce(bucket)

    def reduce_compressed(self, bucket: GradientBucket) -> InFlight:
        """Average the largest entries of each rank."""
        import torch

        from labkit.gradients.compression.packing import join_bytes, split_bytes

        flat, context = bucket.flat, CostContext(self.comm.size, bucket.step, self.steps)
        if self.options.error_feedback:
            flat = self._errors.of(bucket).add_(flat)
        count = _count(self.options, flat.numel(), context)
        indices = largest_indices(flat, count, self.generator(bucket))
        dtype = torch.float16 if self.options.values == "fp16" else flat.dtype
        values = flat[indices].to(dtype)
        pending = self.comm.all_gather(join_bytes(indices.int(), values))
        if self.options.error_feedback:
            flat[indices] -= values.to(flat.dtype)
        if self.options.momentum_correction:
            self._velocities.of(bucket)[indices] = 0
        yield
        out = bucket.flat.zero_()
        for message in pending.wait():
            indices, values = split_bytes(message, [(count, torch.int32), (count, dtype)])
            out.index_add_(0, indices, values.to(out.dtype), alpha=1 / self.comm.size)
        return out

    @classmethod
    def describe_local_state(cls, options: Any) -> str:
        """Describe the buffers of unsent entries, if there are any."""
        return "what it has not sent yet" if options.error_feedback or options.momentum_correction else ""

    @classmethod
    def compressed_bytes(cls, options: Any, shapes: Sequence[Shape], context: CostContext) -> int:
        """Return (N-1) · k · (4 + bytes of a value)."""
        value = 2 if options.values == "fp16" else context.itemsize
        return all_gather_bytes(_count(options, numel(shapes), context) * (4 + value), context.world_size)

    # -- momentum -----------------------------------------------------------------------------------------------------

    @classmethod
    def inner_optimizer_config(cls, options: Any, optimizer: Optimizer) -> Optimizer:
        """Return the config of SGD without momentum if momentum correction replaces it.

        Weight decay would have passed through the momentum m too and accumulated to 1/(1-m) times itself, so it is
        scaled by that factor.
        """
        if not options.momentum_correction:
            return optimizer
        decay = optimizer.weight_decay / (1 - optimizer.momentum)
        return optimizer.model_copy(update={"momentum": 0.0, "weight_decay": decay})

    def attach_optimizer(self, optimizer: torch.optim.Optimizer, settings: Optimizer) -> None:
        """Keep the momentum coefficient for the velocities."""
        super().attach_optimizer(optimizer, settings)
        self._momentum = settings.momentum

    @classmethod
    def problems(cls, experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield the reasons why it cannot run: momentum correction is for SGD with momentum."""
        yield from super().problems(experiment, machine)
        if not experiment.gradients.compression.options["momentum_correction"]:
            return
        field, optimizer = "gradients.compression.momentum_correction", experiment.optimizer
        if optimizer.name != "sgd":
            yield Problem(field, f"the velocity is that of SGD; {optimizer.name} has moments of another kind", "false")
        elif optimizer.momentum == 0:
            yield Problem(field, "SGD has no momentum here (optimizer.momentum is 0)", "false")


def _count(options: Any, size: int, context: CostContext) -> int:
    """Return how many of `size` entries are sent in this step."""
    warmup = resolve_start_step(options.warmup_steps, context.steps, 0.2)
    ratio = options.ratio
    if context.step < warmup and ratio < FIRST_RATIO:
        ratio = FIRST_RATIO * (ratio / FIRST_RATIO) ** (context.step / warmup)
    return min(size, max(1, math.ceil(ratio * size)))


def largest_indices(flat: Tensor, count: int, generator: Any) -> Tensor:
    """Return the indices of the `count` entries of largest magnitude, in no particular order, int64 [count]."""
    import torch

    magnitudes, total = flat.abs(), flat.numel()
    sample_size = max(LEAST_SAMPLE, int(SAMPLE * total))
    above = round(MARGIN * count / total * sample_size)
    if sample_size >= total or not 0 < above < sample_size:
        return magnitudes.topk(count, sorted=False).indices
    sample = magnitudes[torch.randint(total, (sample_size,), generator=generator, device=flat.device)]
    threshold = sample.topk(above, sorted=False).values.min()
    candidates = (magnitudes >= threshold).nonzero().view(-1)
    if len(candidates) < count:  # the sample was not representative
        return magnitudes.topk(count, sorted=False).indices
    return candidates[magnitudes[candidates].topk(count, sorted=False).indices]
