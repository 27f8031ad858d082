"""Methods as a learner writes them in a cell or a file: a compressor, an update rule, a sparsity method, a format,
schedules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from labkit.experiment import Experiment, Machine, Problem
from labkit.experiment.registry import Options as BaseOptions
from labkit.gradients.compression.compressor import Compressor, CostContext, GradientBucket, InFlight, numel
from labkit.gradients.cost import all_reduce_bytes
from labkit.gradients.updates.update import UpdateRule
from labkit.parallel.schedule import PipelineSchedule
from labkit.quantization.full import Single
from labkit.sparsity.method import Sparsifier


class Halves(Compressor):
    """Send every gradient as a half-precision number."""

    class Options(BaseOptions):
        """Options of Halves."""

        scale: float = Field(default=1024.0, gt=0)
        """Factor on the gradients before they are rounded."""
        mode: Literal["sum", "mean"] = "mean"
        """What the ranks exchange."""

    def reduce(self, bucket: GradientBucket) -> InFlight:
        """Average rounded gradients."""
        small = (bucket.flat * (self.options.scale / self.comm.size)).half()
        pending = self.comm.all_reduce(small)
        yield
        return pending.wait().float() / self.options.scale

    @classmethod
    def bucket_bytes(cls, options: Any, shapes: Sequence[Any], context: CostContext) -> int:
        """Two bytes per element, in an all-reduce."""
        return all_reduce_bytes(2 * numel(shapes), context.world_size)


class EveryThird(UpdateRule):
    """Average weights, buffers and moments after every third step."""

    replicas_diverge = True

    def after_update(self, step: int) -> int | None:
        """Average, if it is time."""
        if step % 3 == 2:
            self.average_replicas(step)
        return None


class Checkerboard(Sparsifier):
    """Keep every second weight, from the first step on."""

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Refuse any other target than one half."""
        if experiment.sparsity.target != 0.5:
            yield Problem("sparsity.target", "a checkerboard has as many black as white fields", 0.5)

    def changes_masks(self, step: int) -> bool:
        """Only after the first step."""
        return step == 0

    def choose_masks(self, step: int, weights: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keep the weights with an even index."""
        even = {name: torch.arange(weight.numel()) % 2 == 0 for name, weight in weights.items()}
        return {name: mask.view_as(weights[name]) for name, mask in even.items()}


class Doubled(Single):
    """Train in float64."""

    @staticmethod
    def dtype() -> torch.dtype:
        """Return float64."""
        return torch.float64


class LastFirst(PipelineSchedule):
    """All forward passes, then all backward passes, the latest micro-batch first."""

    stages = "one"

    @staticmethod
    def actions(pp_rank: int, pp: int, stages: Sequence[int], microbatches: int) -> Iterator[str]:
        """Return the forward passes in their order and the backward passes in the opposite one."""
        [stage] = stages
        yield from (f"{stage}F{index}" for index in range(microbatches))
        yield from (f"{stage}B{index}" for index in reversed(range(microbatches)))


class FoldedGPipe(PipelineSchedule):
    """GPipe in a V: the forward passes down and up, then the backward passes, with weight gradients at the end."""

    fold = True
    splits_backward = True

    @staticmethod
    def actions(pp_rank: int, pp: int, stages: Sequence[int], microbatches: int) -> list[str]:
        """Return all F, then all I in the opposite order of stages, then all W."""
        batches = range(microbatches)
        forward = [f"{stage}F{index}" for stage in stages for index in batches]
        inputs = [f"{stage}I{index}" for stage in reversed(stages) for index in batches]
        return forward + inputs + [f"{stage}W{index}" for stage in stages for index in batches]


class WaitsForever(PipelineSchedule):
    """Backward passes before forward passes, which no pipeline can run."""

    @staticmethod
    def actions(pp_rank: int, pp: int, stages: Sequence[int], microbatches: int) -> list[str]:
        """Return all B, then all F."""
        return [f"{stage}{kind}{index}" for kind in "BF" for stage in stages for index in range(microbatches)]
