"""Buffers that change in training, kept equal on all ranks: running means, counts, whatever a model keeps.

Each rank sees other samples, so its running means are those of its share. One process would see all of them. So after
every update such a buffer becomes the mean over the ranks, weighted by their samples: exactly what one process has if
the buffer is a mean of samples, and in any case equal on all ranks, in every evaluation and in the checkpoint (issue
11, B 08). Buffers that have no mean (counts of batches, booleans) take the values of the first rank.

Which buffers change is detected by their values (kernels of batch normalisation do not count versions), and agreed upon
after the first update and before every evaluation and checkpoint; a model without such buffers costs nothing then.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from labkit.gradients.updates.average import as_reals, flatten, unflatten_into
from labkit.parallel.mesh import REDUCED, Mesh

BufferKey = tuple[int, str]
"""Stage and name of a buffer."""


class Buffers:
    """The buffers of this rank's stages. `stages`: the modules used in forward and backward passes."""

    def __init__(self, stages: Mapping[int, nn.Module], mesh: Mesh) -> None:
        self._stages = stages
        self._group: dist.ProcessGroup | None = None
        if dist.is_initialized():
            # Without a mesh all ranks are replicas of one another.
            self._group = mesh.group(*REDUCED) if mesh.device_mesh is not None else dist.group.WORLD
        self._changing: set[BufferKey] = set()
        """Buffers that have changed on any rank; equal on all ranks."""
        self._checksums = self._compute_checksums()
        self._agreed = False

    def _all(self) -> dict[BufferKey, Tensor]:
        return {
            (stage, name): value for stage, module in self._stages.items() for name, value in module.named_buffers()
        }

    def _compute_checksums(self) -> dict[BufferKey, tuple[float, ...]]:
        """Return two checksums of each buffer that is not known to change."""
        return {key: _checksums_of(value) for key, value in self._all().items() if key not in self._changing}

    def after_update(self, samples: float) -> None:
        """Average the buffers that change (collective if there are any), weighted by this rank's `samples`."""
        if self._group is None or not self._checksums:
            return  # no other ranks, or no buffers
        if not self._agreed:
            self._agree()
        self._average(samples)

    def synchronize(self) -> None:
        """Make all buffers equal on all ranks before an evaluation or a checkpoint (collective)."""
        if self._group is None or not self._checksums:
            return
        before = set(self._changing)
        self._agree()
        if self._changing != before:
            self._average(1.0)

    def _agree(self) -> None:
        """Add to `_changing` what has changed on any rank since the model was built (collective)."""
        self._agreed = True
        checksums = self._compute_checksums()
        keys = list(checksums)
        if not keys:
            return
        changed = torch.tensor([checksums[key] != self._checksums.get(key) for key in keys], dtype=torch.uint8)
        changed = changed.to(self._all()[keys[0]].device)
        dist.all_reduce(changed, dist.ReduceOp.MAX, group=self._group)
        self._changing |= {key for key, flag in zip(keys, changed.tolist(), strict=True) if flag}

    @torch.no_grad()
    def _average(self, samples: float) -> None:
        if not self._changing:
            return
        assert self._group is not None
        buffers = self._all()
        chosen = [buffers[key].detach() for key in sorted(self._changing)]
        means = [value for value in chosen if value.is_floating_point() or value.is_complex()]
        rest = [value for value in chosen if not (value.is_floating_point() or value.is_complex())]
        if means:
            sums = flatten(means, torch.float64).mul_(samples)
            sums = torch.cat([sums, sums.new_tensor([samples])])
            dist.all_reduce(sums, group=self._group)
            unflatten_into(means, sums[:-1] / sums[-1])
        first = dist.get_global_rank(self._group, 0)
        for value in rest:
            contiguous = value.contiguous()
            dist.broadcast(contiguous, first, group=self._group)
            value.copy_(contiguous)


def _checksums_of(buffer: Tensor) -> tuple[float, ...]:
    """Return the sum of the buffer's elements, and their sum weighted by their 1-based positions."""
    elements = as_reals(buffer.detach()).to(torch.float64).nan_to_num().flatten()
    positions = torch.arange(1, len(elements) + 1, dtype=torch.float64, device=elements.device)
    return float(elements.sum()), float(elements @ positions)
