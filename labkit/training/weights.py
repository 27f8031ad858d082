"""What each pass counts in its update: the loss of an update is one mean, whatever it is a mean over.

With passes b of all ranks, and mean losses l_b over w_b things (samples, tokens not ignored, weights of classes),
one process that sees the whole batch at once has the loss Σ w_b·l_b / Σ w_b (issue 11, A6). Where a loss is a mean over
samples, both sums are known before; elsewhere the task gives w_b (`Task.batch_weight`), and ranks add them up. Update
rules under which ranks step by themselves have no common batch: there a rank weighs its own passes only.
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
    """What one pass counts."""

    gradient: float
    """Factor on its mean loss, so that the gradients of all passes and ranks make that of the update."""
    shown: float
    """Factor on its mean loss, so that the mean over the samples of all passes is the loss of the update."""


class Weights:
    """Of the passes of one rank. `averaged_over`: the ranks over whose number gradients are divided afterwards.

    `together`: do all ranks work on one batch in each update?
    """

    def __init__(self, task: Task, runtime: Runtime, global_batch: int, averaged_over: int, together: bool) -> None:
        self._task, self.by_samples = task, counts_samples(task)
        """Are all losses means over samples?"""
        self._runtime, self._global_batch, self._averaged_over = runtime, global_batch, averaged_over
        self._together = together and runtime.mesh.data_shard[1] > 1 and dist.is_initialized()

    def of_samples(self, samples: int) -> Weight:
        """A pass over so many samples, if its loss is a mean over them."""
        return Weight(share_weight(samples, self._global_batch, self._averaged_over), 1.0)

    def of(self, batches: Sequence[Batch]) -> list[Weight]:
        """Of all passes of this rank in one update (collective where ranks work together)."""
        sizes = [len(next(iter(batch.values()))) for batch in batches]
        own = [weight_of(self._task, batch) for batch in batches]
        total, samples = float(sum(own)), sum(sizes)
        if self._together:
            sums = self._added_up([total, float(samples)])
            total, samples = sums[0], round(sums[1])
        # A share that belongs to one rank alone counts as much in the ranks' mean as its samples do.
        part = samples / self._global_batch if total > 0 else 0.0
        relative = [weight / total if total > 0 else 0.0 for weight in own]
        return [
            Weight(weight * part * self._averaged_over, weight * samples / size)
            for weight, size in zip(relative, sizes, strict=True)
        ]

    def _added_up(self, numbers: list[float]) -> list[float]:
        """Over all ranks; those that see the same samples count once."""
        mesh = self._runtime.mesh
        sums = torch.tensor(numbers, dtype=torch.float64, device=self._runtime.device)
        dist.all_reduce(sums)
        same = mesh.layout.world_size / mesh.data_shard[1]
        return [number / same for number in sums.tolist()]
