"""Expert parallelism: the experts of a layer are distributed over ranks, and tokens are sent to them (GShard,
arXiv:2006.16668).

Ranks along `ep` see different samples. Each one sorts its pairs of token and choice by expert and sends every rank the
tokens for that rank's experts (all-to-all); the results come back the same way. So an expert sees the tokens of all
these ranks, and its gradient is already summed over them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from labkit.parallel import collectives
from labkit.parallel.cut import shard_parameter
from labkit.parallel.mesh import Mesh


class TokenDispatcher:
    """Replaces the experts of a layer: runs the experts of all ranks of a group on the tokens of all ranks."""

    def __init__(self, experts: nn.Module, group: dist.ProcessGroup) -> None:
        self.experts, self.group = experts, group

    def __call__(self, tokens: Tensor, sizes: list[int]) -> Tensor:
        """Send tokens [rows, width], sorted by expert, to their experts and return the results [rows, width].

        `sizes`: the number of rows for every expert of all ranks.
        """
        ranks = self.group.size()
        send_counts = torch.tensor(sizes, device=tokens.device).view(ranks, -1)
        receive_counts = torch.empty_like(send_counts)  # row r: what rank r has for each of the experts here
        dist.all_to_all_single(receive_counts, send_counts, group=self.group)
        send, receive = send_counts.sum(1).tolist(), receive_counts.sum(1).tolist()
        received = collectives.all_to_all(tokens, self.group, send, receive)
        # What arrives is sorted by rank, then by expert; the experts need it the other way round.
        pieces = received.split(receive_counts.flatten().tolist())
        count = receive_counts.shape[1]
        by_expert = torch.cat([pieces[rank * count + number] for number in range(count) for rank in range(ranks)])
        results = self.experts(by_expert, receive_counts.sum(0).tolist()).split(receive_counts.t().flatten().tolist())
        by_rank = torch.cat([results[number * ranks + rank] for rank in range(ranks) for number in range(count)])
        return collectives.all_to_all(by_rank, self.group, receive, send)


def apply(module: nn.Module, mesh: Mesh) -> None:
    """Keep only this rank's experts of every mixture of experts, in place."""
    from labkit.workloads.models.experts import MixtureOfExperts

    group = mesh.group("ep")
    assert group is not None
    for part in module.modules():
        if isinstance(part, MixtureOfExperts):
            part.experts.up = shard_parameter(part.experts.up, mesh, "ep", 0)
            part.experts.down = shard_parameter(part.experts.down, mesh, "ep", 0)
            part.run = TokenDispatcher(part.experts, group)


def set_sample_weight(module: nn.Module, weight: float) -> None:
    """Set the weight of one sample in the training loss on every mixture, so that its auxiliary loss weighs as much."""
    from labkit.workloads.models.experts import MixtureOfExperts

    for part in module.modules():
        if isinstance(part, MixtureOfExperts):
            part.sample_weight = weight
