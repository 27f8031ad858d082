"""Low rank (PowerSGD: Vogels et al., NeurIPS 2019): a gradient matrix as the product of two thin ones.

For a gradient M (m × n) plus the residual of earlier steps, and Q (n × r) from the last step, it makes one step of a
power iteration:

    P = mean(M·Q)        first round, then orthonormalised
    Q = mean(Mᵀ·P)       second round
    M̂ = P·Qᵀ             the result on all ranks; M - M̂ is the residual for the next step

The mean of products with the same factor is the product with the mean, so both rounds are all-reduces, whatever the
world size. All matrices of a bucket are sent in one message per round. The message of the first round also holds what
is not worth factoring: vectors, and matrices whose factors are not `min_saving` times smaller.

The paper trains for many thousands of steps with rank 4 and less; a training of a few hundred steps has no time to wait
for what a low rank leaves out, hence the default.

torch's own hook starts the second round in the callback of the first, so with several buckets the order may differ
between ranks, and gloo then ends the process; here a bucket advances only when all buckets have been started.

Bytes that one of N ranks sends: 2·(N-1)/N · bytes per element · ( Σ r·(m+n) over the matrices + the rest ).
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
        """Options of PowerSGD."""

        rank: int = Field(default=12, ge=1, le=4096)
        """Rank of the approximation of each gradient matrix."""
        min_saving: float = Field(default=2.0, ge=0, le=1e6)
        """Factor a matrix only if that makes it at least this many times smaller."""
        error_feedback: bool = True
        """Add what was left out to the next gradient."""

    def __init__(self, *arguments: Any) -> None:
        from labkit.gradients.compression.error_feedback import ErrorFeedback

        super().__init__(*arguments)
        self._errors = ErrorFeedback()
        self._factors: dict[Any, Tensor] = {}
        self._restored: dict[int, Tensor] = {}
        """Factors from a checkpoint, by the order in which their matrices come, until they come."""

    def reduce_compressed(self, bucket: GradientBucket) -> InFlight:
        """Average a bucket, with a low-rank approximation of its matrices."""
        import torch

        flat, views = bucket.flat, bucket.views(bucket.flat)
        errors = self._errors.of(bucket) if self.options.error_feedback else None
        if errors is not None:
            flat.add_(errors)
            errors.zero_()
        ranks = [_rank(self.options, shape) for shape in bucket.shapes]
        factored = [index for index, rank in enumerate(ranks) if rank]
        matrices = [views[index].flatten(1) for index in factored]
        unfactored = [view for view, rank in zip(views, ranks, strict=True) if not rank]
        old = [self._factor(bucket.parameters[index], bucket.shapes[index], ranks[index], flat) for index in factored]

        left = [matrix @ factor for matrix, factor in zip(matrices, old, strict=True)]
        first = self._start_mean([*left, *unfactored])
        yield
        means = _split(first.wait(), [*left, *unfactored])
        for view, mean in zip(unfactored, means[len(left) :], strict=True):
            view.copy_(mean)
        # With nearly parallel columns Householder reflections stay orthonormal in float32; Gram-Schmidt does not.
        left = [torch.linalg.qr(mean).Q for mean in means[: len(left)]]
        own = [matrix.T @ factor for matrix, factor in zip(matrices, left, strict=True)]
        second = self._start_mean(own)
        yield
        right = _split(second.wait(), own)
        for index, matrix, factor, mine, mean in zip(factored, matrices, left, own, right, strict=True):
            if errors is not None:
                residual = bucket.views(errors)[index].flatten(1)
                torch.addmm(matrix, factor, mine.T, alpha=-1, out=residual)
            torch.mm(factor, mean.T, out=matrix)
            self._factors[bucket.parameters[index]] = mean
        return flat

    def _start_mean(self, tensors: list[Tensor]) -> PendingWork:
        """Start to average all tensors in one message."""
        import torch

        empty = torch.zeros(0) if not tensors else tensors[0].new_zeros(0)
        return self.comm.all_reduce(torch.cat([empty, *(tensor.flatten() for tensor in tensors)]).div_(self.comm.size))

    def _factor(self, key: Any, shape: Shape, rank: int, like: Tensor) -> Tensor:
        """Return Q from the last step or, the first time, random numbers that are the same on all ranks."""
        import torch

        index = len(self._factors)
        if key not in self._factors and index in self._restored:
            self._factors[key] = self._restored.pop(index).to(like.device, like.dtype)
        if key not in self._factors:
            generator = torch.Generator().manual_seed(self.seed * 4099 + len(self._factors))
            columns = math.prod(shape[1:])
            self._factors[key] = torch.randn(columns, rank, generator=generator).to(like.device, like.dtype)
        return self._factors[key]

    def state(self) -> dict[str, Tensor]:
        """Return the error-feedback buffers and the factors for a checkpoint."""
        factors = {f"factors.{index}": factor for index, factor in enumerate(self._factors.values())}
        return super().state() | {f"factors.{index}": factor for index, factor in self._restored.items()} | factors

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        super().load(state)
        prefix = "factors."
        self._restored = {int(key[len(prefix) :]): factor for key, factor in state.items() if key.startswith(prefix)}

    @classmethod
    def describe_local_state(cls, options: Any) -> str:
        """Describe the error-feedback buffers and the factors."""
        return "what a low rank has left out, and its factors"

    @classmethod
    def compressed_bytes(cls, options: Any, shapes: Sequence[Shape], context: CostContext) -> int:
        """Return 2·(N-1)/N · bytes per element · ( Σ r·(m+n) + the rest ), as the sum of the two rounds."""
        size, ranks = context.itemsize, [_rank(options, shape) for shape in shapes]
        factored = [(shape, rank) for shape, rank in zip(shapes, ranks, strict=True) if rank]
        first = sum(rank * shape[0] for shape, rank in factored)
        first += numel([shape for shape, rank in zip(shapes, ranks, strict=True) if not rank])
        second = sum(rank * math.prod(shape[1:]) for shape, rank in factored)
        return all_reduce_bytes(first * size, context.world_size) + all_reduce_bytes(second * size, context.world_size)

    @classmethod
    def problems(cls, experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield the reasons why it cannot run: it needs matrices, not slices of the flat gradient."""
        yield from super().problems(experiment, machine)
        field, layout = "gradients.compression.method", experiment.layout
        if experiment.gradients.hierarchical:
            yield Problem(
                field, "between hosts a rank has a slice of all gradients, and PowerSGD needs matrices", "none"
            )
        if layout.dp_shard > 1 and layout.zero_stage in (1, 2) and replicas(layout) > 1:
            yield Problem(field, "ZeRO leaves a rank a slice of all gradients, and PowerSGD needs matrices", "none")


def _rank(options: Any, shape: Shape) -> int:
    """Return the rank of the factors of a gradient with this shape; 0 if it is sent unfactored."""
    if len(shape) < 2 or 0 in shape:
        return 0
    rows, columns = shape[0], math.prod(shape[1:])
    rank = min(options.rank, rows, columns)
    return rank if rows * columns >= options.min_saving * rank * (rows + columns) else 0


def _split(message: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Split a flat message into tensors with the shapes of `like`."""
    parts = message.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]
