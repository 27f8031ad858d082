"""Buffers that change in training, made one for all ranks: running means, counts, whatever a model keeps.

Each rank sees other samples, so its running means are those of its share. One process would see all of them. So after
every update such a buffer becomes the mean over the ranks, weighted by their samples: exactly what one process has if
the buffer is a mean of samples, and in any case equal on all ranks, in every evaluation and in the checkpoint (issue
11, B 08). Numbers that have no mean (counts of batches, truth values) are those of the first rank.

Which buffers change is seen by their numbers (kernels of batch normalisation do not count versions), and agreed upon
after the first update and before every evaluation and checkpoint; a model without any costs nothing in between.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from labkit.gradients.updates.average import as_reals, flatten, unflatten_into
from labkit.parallel.mesh import REDUCED, Mesh

Place = tuple[int, str]
"""Stage and name of a buffer."""


class Buffers:
    """The buffers of this rank's stages. `stages`: the modules that passes go through."""

    def __init__(self, stages: Mapping[int, nn.Module], mesh: Mesh) -> None:
        self._stages = stages
        self._group: dist.ProcessGroup | None = None
        if dist.is_initialized():
            # Without a mesh all ranks are replicas of one another.
            self._group = mesh.group(*REDUCED) if mesh.device_mesh is not None else dist.group.WORLD
        self._changing: set[Place] = set()
        """Equal on all ranks."""
        self._seen = self._sums()
        self._agreed = False

    def _all(self) -> dict[Place, Tensor]:
        return {(at, name): value for at, stage in self._stages.items() for name, value in stage.named_buffers()}

    def _sums(self) -> dict[Place, tuple[float, ...]]:
        """Two sums by which the numbers of a buffer are known again, for each that is not known to change."""
        return {place: _sums_of(value) for place, value in self._all().items() if place not in self._changing}

    def after_update(self, samples: float) -> None:
        """Unite what changes (collective where something does). `samples`: how many this rank has seen in it."""
        if self._group is None or not self._seen:
            return  # nobody to agree with, or no buffers
        if not self._agreed:
            self._agree()
        self._unite(samples)

    def settle(self) -> None:
        """Before an evaluation or a checkpoint (collective): all ranks hold the same."""
        if self._group is None or not self._seen:
            return
        before = set(self._changing)
        self._agree()
        if self._changing != before:
            self._unite(1.0)

    def _agree(self) -> None:
        """Learn from all ranks what has changed since the last look."""
        self._agreed = True
        now = self._sums()
        places = list(now)
        if not places:
            return
        mine = torch.tensor([now[place] != self._seen.get(place) for place in places], dtype=torch.uint8)
        mine = mine.to(self._all()[places[0]].device)
        dist.all_reduce(mine, dist.ReduceOp.MAX, group=self._group)
        self._changing |= {place for place, changed in zip(places, mine.tolist(), strict=True) if changed}

    @torch.no_grad()
    def _unite(self, samples: float) -> None:
        if not self._changing:
            return
        assert self._group is not None
        held = self._all()
        chosen = [held[place].detach() for place in sorted(self._changing)]
        means = [value for value in chosen if value.is_floating_point() or value.is_complex()]
        rest = [value for value in chosen if not (value.is_floating_point() or value.is_complex())]
        if means:
            sums = flatten(means, torch.float64).mul_(samples)
            sums = torch.cat([sums, sums.new_tensor([samples])])
            dist.all_reduce(sums, group=self._group)
            unflatten_into(means, sums[:-1] / sums[-1])
        first = dist.get_global_rank(self._group, 0)
        for value in rest:
            whole = value.contiguous()
            dist.broadcast(whole, first, group=self._group)
            value.copy_(whole)


def _sums_of(buffer: Tensor) -> tuple[float, ...]:
    """The sum of the numbers, and their sum weighted by their places."""
    numbers = as_reals(buffer.detach()).to(torch.float64).nan_to_num().flatten()
    places = torch.arange(1, len(numbers) + 1, dtype=torch.float64, device=numbers.device)
    return float(numbers.sum()), float(numbers @ places)
