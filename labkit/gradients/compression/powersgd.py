"""Low rank (PowerSGD: Vogels et al., NeurIPS 2019): a gradient matrix as the product of two thin ones.

For a gradient M (m × n) with what was left out before, and Q (n × r) from the last update, one step of a power
iteration:

    P = mean(M·Q)        first round, then made orthonormal
    Q = mean(Mᵀ·P)       second round
    M̂ = P·Qᵀ             what all ranks take; M - M̂ is kept for the next update

Means of products with the same factor are products with the mean, so both rounds are all-reduces, whatever the number
of ranks. All matrices of a bucket travel in one message a round, in the first one together with what is not worth
factoring: vectors, and matrices whose factors are not `min_saving` times smaller.

The paper trains for many thousands of updates with rank 4 and less; a training of a few hundred has no time to wait for
what a low rank leaves out, hence the default.

torch's own hook starts the second round in the callback of the first, in another order on another rank if there are
several buckets, and gloo then ends the process; here a bucket goes on only when all are under way.

Bytes that one of N ranks sends: 2·(N-1)/N · bytes of a number · ( Σ r·(m+n) over the matrices + the rest ).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from labkit.experiment.problem import Problem
from labkit.gradients.compression.compressor import CostContext, GradientBucket, InFlight, Shape, numel, replicas
from labkit.gradients.compression.late import LateCompressor, LateOptions
from labkit.gradients.cost import all_reduce_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from labkit.experiment import Experiment
    from labkit.experiment.machine import Machine
    from labkit.gradients.wire import PendingWork


class PowerSGD(LateCompressor):
    """PowerSGD with warm start and error feedback."""

    name = "powersgd"

    class Options(LateOptions):
        """How thin the factors are."""

        rank: int = Field(default=12, ge=1, le=4096)
        """Rank of what is sent of a matrix."""
        min_saving: float = Field(default=2.0, ge=0, le=1e6)
        """A matrix is factored if that makes it so many times smaller."""
        error_feedback: bool = True
        """What was left out is added to the next gradient."""

    def __init__(self, *arguments: Any) -> None:
        from labkit.gradients.compression.error_feedback import ErrorFeedback

        super().__init__(*arguments)
        self._errors = ErrorFeedback()
        self._factors: dict[Any, Tensor] = {}
        self._restored: dict[int, Tensor] = {}
        """Factors from a checkpoint, by the order in which matrices first came, until they come."""

    def reduce_compressed(self, bucket: GradientBucket) -> InFlight:
        """The mean, as far as it has a low rank."""
        import torch

        flat, views = bucket.flat, bucket.views(bucket.flat)
        errors = self._errors.of(bucket) if self.options.error_feedback else None
        if errors is not None:
            flat.add_(errors)
            errors.zero_()
        ranks = [_rank(self.options, shape) for shape in bucket.shapes]
        chosen = [place for place, rank in enumerate(ranks) if rank]
        matrices = [views[place].flatten(1) for place in chosen]
        whole = [view for view, rank in zip(views, ranks, strict=True) if not rank]
        old = [self._factor(bucket.parameters[place], bucket.shapes[place], ranks[place], flat) for place in chosen]

        left = [matrix @ factor for matrix, factor in zip(matrices, old, strict=True)]
        first = self._send([*left, *whole])
        yield
        arrived = _parts(first.wait(), [*left, *whole])
        for view, mean in zip(whole, arrived[len(left) :], strict=True):
            view.copy_(mean)
        # Householder's way stays orthonormal in float32 where columns are nearly alike; Gram and Schmidt's does not.
        left = [torch.linalg.qr(one).Q for one in arrived[: len(left)]]
        own = [matrix.T @ one for matrix, one in zip(matrices, left, strict=True)]
        second = self._send(own)
        yield
        right = _parts(second.wait(), own)
        for place, matrix, one, mine, mean in zip(chosen, matrices, left, own, right, strict=True):
            if errors is not None:
                kept = bucket.views(errors)[place].flatten(1)
                torch.addmm(matrix, one, mine.T, alpha=-1, out=kept)
            torch.mm(one, mean.T, out=matrix)
            self._factors[bucket.parameters[place]] = mean
        return flat

    def _send(self, parts: list[Tensor]) -> PendingWork:
        """The mean of all parts, in one message."""
        import torch

        empty = torch.zeros(0) if not parts else parts[0].new_zeros(0)
        return self.comm.all_reduce(torch.cat([empty, *(part.flatten() for part in parts)]).div_(self.comm.size))

    def _factor(self, key: Any, shape: Shape, rank: int, like: Tensor) -> Tensor:
        """What the last update left, or, the first time, random numbers that are the same on all ranks."""
        import torch

        place = len(self._factors)
        if key not in self._factors and place in self._restored:
            self._factors[key] = self._restored.pop(place).to(like.device, like.dtype)
        if key not in self._factors:
            generator = torch.Generator().manual_seed(self.seed * 4099 + len(self._factors))
            columns = math.prod(shape[1:])
            self._factors[key] = torch.randn(columns, rank, generator=generator).to(like.device, like.dtype)
        return self._factors[key]

    def state(self) -> dict[str, Tensor]:
        """What was left out, and the factors."""
        factors = {f"factors.{place}": factor for place, factor in enumerate(self._factors.values())}
        return super().state() | {f"factors.{place}": one for place, one in self._restored.items()} | factors

    def load(self, state: dict[str, Tensor]) -> None:
        """Both again."""
        super().load(state)
        start = "factors."
        self._restored = {int(key[len(start) :]): one for key, one in state.items() if key.startswith(start)}

    @classmethod
    def describe_local_state(cls, options: Any) -> str:
        """In words."""
        return "what a low rank has left out, and its factors"

    @classmethod
    def compressed_bytes(cls, options: Any, shapes: Sequence[Shape], context: CostContext) -> int:
        """2·(N-1)/N · bytes of a number · ( Σ r·(m+n) + the rest ), the two rounds one after the other."""
        size, ranks = context.itemsize, [_rank(options, shape) for shape in shapes]
        factored = [(shape, rank) for shape, rank in zip(shapes, ranks, strict=True) if rank]
        first = sum(rank * shape[0] for shape, rank in factored)
        first += numel([shape for shape, rank in zip(shapes, ranks, strict=True) if not rank])
        second = sum(rank * math.prod(shape[1:]) for shape, rank in factored)
        return all_reduce_bytes(first * size, context.world_size) + all_reduce_bytes(second * size, context.world_size)

    @classmethod
    def problems(cls, experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """It needs whole matrices."""
        yield from super().problems(experiment, machine)
        field, layout = "gradients.compression.method", experiment.layout
        if experiment.gradients.hierarchical:
            yield Problem(
                field, "between hosts a rank has a stretch of all gradients, and PowerSGD needs matrices", "none"
            )
        if layout.dp_shard > 1 and layout.zero_stage in (1, 2) and replicas(layout) > 1:
            yield Problem(field, "ZeRO leaves a rank a stretch of all gradients, and PowerSGD needs matrices", "none")


def _rank(options: Any, shape: Shape) -> int:
    """Rank of the factors of such a gradient; 0 if it travels whole."""
    if len(shape) < 2 or 0 in shape:
        return 0
    rows, columns = shape[0], math.prod(shape[1:])
    rank = min(options.rank, rows, columns)
    return rank if rows * columns >= options.min_saving * rank * (rows + columns) else 0


def _parts(message: Tensor, like: list[Tensor]) -> list[Tensor]:
    parts = message.split([one.numel() for one in like])
    return [part.view(one.shape) for part, one in zip(parts, like, strict=True)]
