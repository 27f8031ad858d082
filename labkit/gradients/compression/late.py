"""What methods have in common that suit no optimizer which divides by the size of what it is given.

AdamW divides a gradient by the root √v of the mean of its squares. Of what comes out of a compressor the squares say
little: signs are all alike, and an entry that is sent every hundredth update, a hundredfold, has a mean square a
hundred times too large, so AdamW moves its weight ten times too slowly. So these methods begin late, and as 1-bit Adam
does it (Tang et al., ICML 2021), v stays from there on as whole gradients have left it (`freeze`). Then an update is
linear in what arrives, nothing that error feedback brings late is lost, and gradients are compressed in units of √v,
that is by what they do to the weights. SGD needs none of it.

A method may also ask for the momentum (`averages_momentum`): then what ranks average is the momentum with the gradient of each
in it, and AdamW takes the mean as it is. What is left out of a momentum that changes slowly is left out only once; but
a method that sends little of it (top-k, low rank) would send the same part over and over.

Seen in single runs of the language recipe (400 updates, two ranks, seed 0, held-out loss; 1.666 without compression,
1.639 with frozen v alone): sign 1.84 late, 1.80 late and frozen, 1.66 so with momentum; ternary 1.76 and 1.66; PowerSGD
of rank 4 1.79 and 1.78, of rank 12 1.67. A twentieth, a tenth or a quarter of the training before it begins makes no
clear difference.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from labkit.experiment.registry import Options as BaseOptions
from labkit.gradients.compression.compressor import (
    Compressor,
    CostContext,
    GradientBucket,
    InFlight,
    Shape,
    resolve_start_step,
)

if TYPE_CHECKING:
    import torch

    from labkit.experiment import Optimizer
    from labkit.gradients.compression.frozen_adamw import FrozenAdamW


class LateOptions(BaseOptions):
    """When compression begins, and what AdamW makes of it."""

    start_step: int | None = Field(default=None, ge=0, le=10_000_000)
    """Updates with whole gradients before it begins; empty for a twentieth of the training."""
    freeze: bool = True
    """With AdamW: its mean squares stay as they are when compression begins (not if that is at once)."""


class LateCompressor(Compressor):
    """Base of methods that begin late. A subclass has `reduce_compressed` and `compressed_bytes`."""

    warmup_fraction: ClassVar[float] = 0.05
    """Of the training, before which it does not begin unless told to."""

    class Options(LateOptions):
        pass

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.adam: FrozenAdamW | None = None
        """The optimizer, if its mean squares freeze."""

    @abstractmethod
    def reduce_compressed(self, bucket: GradientBucket) -> InFlight:
        """Average `bucket.flat`, smaller."""

    @classmethod
    @abstractmethod
    def compressed_bytes(cls, options: Any, shapes: Sequence[Shape], context: CostContext) -> int:
        """Of one bundle, once it has begun."""

    def reduce(self, bucket: GradientBucket) -> InFlight:
        """The mean: whole at first, then compressed."""
        if bucket.step < self.first_compressed_step(self.options, self.steps):
            return self.reduce_uncompressed(bucket)
        if self.averages_momentum and self.adam is not None:
            for parameter, view in zip(bucket.parameters, bucket.views(bucket.flat), strict=True):
                self.adam.blend(parameter, view)
        return self.reduce_compressed(bucket)

    @classmethod
    def bucket_bytes(cls, options: Any, shapes: Sequence[Shape], context: CostContext) -> int:
        """At first those of an all-reduce."""
        begun = context.step >= cls.first_compressed_step(options, context.steps)
        return cls.compressed_bytes(options, shapes, context) if begun else cls.uncompressed_bytes(shapes, context)

    @classmethod
    def first_compressed_step(cls, options: Any, steps: int) -> int:
        """The first update with compression."""
        return resolve_start_step(options.start_step, steps, cls.warmup_fraction)

    # -- the optimizer ------------------------------------------------------------------------------------------------

    def optimizer(self, settings: Optimizer) -> Callable[[Any], torch.optim.Optimizer] | None:
        """AdamW that stops learning its denominators."""
        first_compressed_step = self.first_compressed_step(self.options, self.steps)
        if settings.name != "adamw" or not self.options.freeze or not first_compressed_step:
            return None
        from labkit.gradients.compression.frozen_adamw import FrozenAdamW

        return lambda groups: FrozenAdamW(groups, settings, first_compressed_step, self.averages_momentum)

    def attach_optimizer(self, optimizer: torch.optim.Optimizer, settings: Optimizer) -> None:
        """Learn whose units these are."""
        from labkit.gradients.compression.frozen_adamw import FrozenAdamW

        self.adam = optimizer if isinstance(optimizer, FrozenAdamW) else None

    def scale(self, bucket: GradientBucket, parameter: Any) -> torch.Tensor | None:
        """√v of the parameter."""
        begun = bucket.step >= self.first_compressed_step(self.options, self.steps)
        return self.adam.denominator(parameter) if self.adam is not None and begun else None
