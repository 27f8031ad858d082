"""Expert parallelism: the experts of a layer are dealt out to ranks, and tokens travel to them (GShard,
arXiv:2006.16668).

Ranks along `ep` see different samples. Each one sorts its pairs of token and choice by expert and sends every rank what
is for its experts (all-to-all); the results come back the same way. So an expert sees the tokens of all these ranks,
and its gradient is already summed over them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from labkit.parallel import collectives
from labkit.parallel.cut import cut
from labkit.parallel.mesh import Mesh


class TokenDispatcher:
    """Runs the experts of all ranks of a group on the tokens of all ranks: takes the place of the experts."""

    def __init__(self, experts: nn.Module, group: dist.ProcessGroup) -> None:
        self.experts, self.group = experts, group

    def __call__(self, tokens: Tensor, sizes: list[int]) -> Tensor:
        """Tokens sorted by expert [rows, width] and the rows of every expert, of all ranks; results [rows, width]."""
        ranks = self.group.size()
        wanted = torch.tensor(sizes, device=tokens.device).view(ranks, -1)
        coming = torch.empty_like(wanted)  # row r: what rank r has for each of the experts here
        dist.all_to_all_single(coming, wanted, group=self.group)
        there, here = wanted.sum(1).tolist(), coming.sum(1).tolist()
        arrived = collectives.all_to_all(tokens, self.group, there, here)
        # What arrives is sorted by rank, then by expert; the experts want it the other way round.
        pieces = arrived.split(coming.flatten().tolist())
        count = coming.shape[1]
        by_expert = torch.cat([pieces[rank * count + number] for number in range(count) for rank in range(ranks)])
        results = self.experts(by_expert, coming.sum(0).tolist()).split(coming.t().flatten().tolist())
        by_rank = torch.cat([results[number * ranks + rank] for rank in range(ranks) for number in range(count)])
        return collectives.all_to_all(by_rank, self.group, here, there)


def apply(module: nn.Module, mesh: Mesh) -> None:
    """Keep this rank's experts of every mixture, in place."""
    from labkit.workloads.models.experts import MixtureOfExperts

    group = mesh.group("ep")
    assert group is not None
    for part in module.modules():
        if isinstance(part, MixtureOfExperts):
            part.experts.up = cut(part.experts.up, mesh, "ep", 0)
            part.experts.down = cut(part.experts.down, mesh, "ep", 0)
            part.run = TokenDispatcher(part.experts, group)


def weigh_samples(module: nn.Module, weight: float) -> None:
    """Tell every mixture what one sample weighs in the loss that is followed backward: its own loss weighs as much."""
    from labkit.workloads.models.experts import MixtureOfExperts

    for part in module.modules():
        if isinstance(part, MixtureOfExperts):
            part.sample_weight = weight
