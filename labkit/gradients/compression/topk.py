"""The largest entries, with error feedback (Deep Gradient Compression: Lin et al., ICLR 2018).

A rank adds what it has not sent before, sends the k entries of the greatest magnitude of each bucket, place and value,
and keeps the others for later. Finding them: a threshold is estimated from a sample, and only what lies above it is
sorted, so that exactly the k largest are sent without sorting everything.

`momentum_correction` is for SGD with momentum m: the velocity u ← m·u + g is what is summed up and sent instead of the
gradient, and is forgotten where it was sent; the optimizer then adds no momentum of its own. So a gradient that waits
gathers the same momentum as one that does not. Over the first updates more is sent: the ratio falls from 1/4 to its
value, exponentially.

At a ratio of 1 % an entry waits about a hundred updates. A training of many thousands does not mind, and that is what
the paper is about; one of a few hundred does, hence the default.

Bytes that one of N ranks sends for n numbers: (N-1) · k · (4 + bytes of a value), k = ⌈ratio · n⌉.
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
"""Of the first update, with a warm-up."""
SAMPLE = 0.01
LEAST_SAMPLE = 4096
MARGIN = 1.3
"""So many times k entries should lie above the estimated threshold, so that seldom fewer than k do."""


class TopK(LateCompressor):
    """DGC."""

    name = "topk"

    class Options(LateOptions):
        """How much is sent, and what becomes of the rest."""

        ratio: float = Field(default=0.15, gt=0, le=1)
        """Which part of the entries of a bucket is sent."""
        warmup_steps: int | None = Field(default=None, ge=0, le=10_000_000)
        """Updates, from the first, over which the ratio falls from 0.25 to its value; empty for a fifth of all."""
        values: Literal["fp32", "fp16"] = "fp32"
        """Number format in which values travel (fp32: that of the gradient); what is rounded off is kept for later."""
        error_feedback: bool = True
        """What was not sent is added to the next gradient."""
        momentum_correction: bool = False
        """Sum up the velocity of SGD with momentum instead of its gradient."""

    def __init__(self, *arguments: Any) -> None:
        from labkit.gradients.compression.error_feedback import ErrorFeedback

        super().__init__(*arguments)
        self._errors, self._velocities = ErrorFeedback(), ErrorFeedback()
        self._momentum = 0.0

    def reduce(self, bucket: GradientBucket) -> InFlight:
        """The mean of the gradients or, with momentum correction, of the velocities."""
        if self.options.momentum_correction:
            velocity = self._velocities.of(bucket)
            bucket.flat.copy_(velocity.mul_(self._momentum).add_(bucket.flat))
        return super().reduce(bucket)

    def reduce_compressed(self, bucket: GradientBucket) -> InFlight:
        """The mean of what is largest on each rank."""
        import torch

        from labkit.gradients.compression.packing import join_bytes, split_bytes

        flat, context = bucket.flat, CostContext(self.comm.size, bucket.step, self.steps)
        if self.options.error_feedback:
            flat = self._errors.of(bucket).add_(flat)
        count = _count(self.options, flat.numel(), context)
        places = largest_indices(flat, count, self.generator(bucket))
        dtype = torch.float16 if self.options.values == "fp16" else flat.dtype
        values = flat[places].to(dtype)
        pending = self.comm.all_gather(join_bytes(places.int(), values))
        if self.options.error_feedback:
            flat[places] -= values.to(flat.dtype)
        if self.options.momentum_correction:
            self._velocities.of(bucket)[places] = 0
        yield
        out = bucket.flat.zero_()
        for message in pending.wait():
            places, values = split_bytes(message, [(count, torch.int32), (count, dtype)])
            out.index_add_(0, places, values.to(out.dtype), alpha=1 / self.comm.size)
        return out

    @classmethod
    def describe_local_state(cls, options: Any) -> str:
        """In words."""
        return "what it has not sent yet" if options.error_feedback or options.momentum_correction else ""

    @classmethod
    def compressed_bytes(cls, options: Any, shapes: Sequence[Shape], context: CostContext) -> int:
        """(N-1) · k · (4 + bytes of a value)."""
        value = 2 if options.values == "fp16" else context.itemsize
        return all_gather_bytes(_count(options, numel(shapes), context) * (4 + value), context.world_size)

    # -- momentum -----------------------------------------------------------------------------------------------------

    @classmethod
    def inner_optimizer_config(cls, options: Any, optimizer: Optimizer) -> Optimizer:
        """SGD without momentum, if that is here.

        Weight decay would have gone through the momentum too, and added up to 1/(1-m) of itself.
        """
        if not options.momentum_correction:
            return optimizer
        decay = optimizer.weight_decay / (1 - optimizer.momentum)
        return optimizer.model_copy(update={"momentum": 0.0, "weight_decay": decay})

    def attach_optimizer(self, optimizer: torch.optim.Optimizer, settings: Optimizer) -> None:
        """Learn the momentum."""
        super().attach_optimizer(optimizer, settings)
        self._momentum = settings.momentum

    @classmethod
    def problems(cls, experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Momentum correction is for SGD with momentum."""
        yield from super().problems(experiment, machine)
        if not experiment.gradients.compression.options["momentum_correction"]:
            return
        field, optimizer = "gradients.compression.momentum_correction", experiment.optimizer
        if optimizer.name != "sgd":
            yield Problem(field, f"the velocity is that of SGD; {optimizer.name} has moments of another kind", "false")
        elif optimizer.momentum == 0:
            yield Problem(field, "SGD has no momentum here (optimizer.momentum is 0)", "false")


def _count(options: Any, size: int, context: CostContext) -> int:
    """How many of `size` entries are sent in this update."""
    warmup = resolve_start_step(options.warmup_steps, context.steps, 0.2)
    ratio = options.ratio
    if context.step < warmup and ratio < FIRST_RATIO:
        ratio = FIRST_RATIO * (ratio / FIRST_RATIO) ** (context.step / warmup)
    return min(size, max(1, math.ceil(ratio * size)))


def largest_indices(flat: Tensor, count: int, generator: Any) -> Tensor:
    """Places of the `count` entries of the greatest magnitude, in no order, int64 [count]."""
    import torch

    sizes, total = flat.abs(), flat.numel()
    drawn = max(LEAST_SAMPLE, int(SAMPLE * total))
    wanted = round(MARGIN * count / total * drawn)
    if drawn >= total or not 0 < wanted < drawn:
        return sizes.topk(count, sorted=False).indices
    sample = sizes[torch.randint(total, (drawn,), generator=generator, device=flat.device)]
    threshold = sample.topk(wanted, sorted=False).values.min()
    candidates = (sizes >= threshold).nonzero().view(-1)
    if len(candidates) < count:  # the sample was not like the rest
        return sizes.topk(count, sorted=False).indices
    return candidates[sizes[candidates].topk(count, sorted=False).indices]
