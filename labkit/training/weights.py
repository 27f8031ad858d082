"""Weights of micro-batches: the loss of an optimizer step is one mean over the whole batch, whatever it is a mean over.

With micro-batches b of all ranks, and mean losses l_b over w_b items (samples, tokens that are not ignored, class
weights), one process that sees the whole batch at once computes the loss Σ w_b·l_b / Σ w_b (issue 11, A6). If a loss is
a mean over samples, both sums are known in advance. Otherwise the task returns w_b (`Task.batch_weight`), and the ranks
all-reduce the sums. Update rules whose ranks step independently have no common batch; there a rank weights only its own
micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from labkit.parallel.replicate import share_weight
from labkit.parallel.weigh import counts_samples, weight_of
from labkit.training.runtime import Runtime
from labkit.workloads.base import Batch, Task


@dataclass(frozen=True)
class Weight:
    """Weight of one micro-batch in its optimizer step."""

    gradient: float
    """Factor on its mean loss, so that the gradients of all micro-batches and ranks add up to that of the batch."""
    reported: float
    """Factor on its mean loss, so that the mean over the samples of all micro-batches is the loss of the batch."""


class Weights:
    """Computes the weights of one rank's micro-batches.

    `averaged_over` is the number of ranks by which gradients are divided after the reduction. `together` is True if all
    ranks work on one common batch in each optimizer step.
    """

    def __init__(self, task: Task, runtime: Runtime, global_batch: int, averaged_over: int, together: bool) -> None:
        self._task, self.by_samples = task, counts_samples(task)
        """True if all losses are means over samples."""
        self._runtime, self._global_batch, self._averaged_over = runtime, global_batch, averaged_over
        self._together = together and runtime.mesh.data_shard[1] > 1 and dist.is_initialized()

    def of_samples(self, samples: int) -> Weight:
        """Return the weight of a micro-batch of `samples` samples whose loss is a mean over them."""
        return Weight(share_weight(samples, self._global_batch, self._averaged_over), 1.0)

    def of(self, batches: Sequence[Batch]) -> list[Weight]:
        """Return the weights of all micro-batches of this rank in one step (collective if ranks work on one batch)."""
        sizes = [len(next(iter(batch.values()))) for batch in batches]
        own = [weight_of(self._task, batch) for batch in batches]
        total, samples = float(sum(own)), sum(sizes)
        if self._together:
            sums = self._sum_over_ranks([total, float(samples)])
            total, samples = sums[0], round(sums[1])
        # If a rank weights only its own share, that share counts in the ranks' mean in proportion to its samples.
        fraction = samples / self._global_batch if total > 0 else 0.0
        relative = [weight / total if total > 0 else 0.0 for weight in own]
        return [
            Weight(weight * fraction * self._averaged_over, weight * samples / size)
            for weight, size in zip(relative, sizes, strict=True)
        ]

    def _sum_over_ranks(self, values: list[float]) -> list[float]:
        """Return the sums over all ranks; ranks that see the same samples count once."""
        mesh = self._runtime.mesh
        sums = torch.tensor(values, dtype=torch.float64, device=self._runtime.device)
        dist.all_reduce(sums)
        duplicates = mesh.layout.world_size / mesh.data_shard[1]
        return [value / duplicates for value in sums.tolist()]
