"""Expert parallelism: the experts of a layer are distributed over ranks, and tokens are sent to them (GShard,
arXiv:2006.16668).

Ranks along `ep` see different samples. Each one sorts its pairs of token and choice by expert and sends every rank the
tokens for that rank's experts (all-to-all); the results come back the same way. So an expert sees the tokens of all
these ranks, and its gradient is already summed over them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from labkit.parallel import collectives
from labkit.parallel.cut import shard_parameter
from labkit.parallel.mesh import Mesh


class TokenDispatcher:
    """Runs the experts of all ranks of a group on the tokens of all ranks, in place of the experts of a layer."""

    def __init__(self, experts: nn.Module, group: dist.ProcessGroup) -> None:
        self.experts, self.group = experts, group

    def __call__(self, counts: Tensor) -> TokenExchange:
        """Tell every rank how many tokens it will get for each of its experts (collective).

        `counts`: the number of this rank's tokens for every expert of all ranks, int64 [experts]. The host waits for
        the device once, for both directions.
        """
        ranks = self.group.size()
        both = counts.new_empty((2, len(counts)))
        both[0] = counts
        dist.all_to_all_single(both[1], both[0], group=self.group)
        sent, received = both.tolist()
        here = len(counts) // ranks
        return TokenExchange(self, sent, [received[rank * here : (rank + 1) * here] for rank in range(ranks)])


@dataclass(frozen=True)
class TokenExchange:
    """One forward pass of a `TokenDispatcher`."""

    dispatcher: TokenDispatcher
    sizes: list[int]
    """Number of this rank's tokens for every expert of all ranks."""
    received: list[list[int]]
    """Row r: the number of tokens of rank r for each of the experts here."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """Send tokens [rows, width], sorted by expert, to their experts and return the results [rows, width]."""
        group, ranks, here = self.dispatcher.group, len(self.received), len(self.received[0])
        send = [sum(self.sizes[rank * here : (rank + 1) * here]) for rank in range(ranks)]
        receive = [sum(row) for row in self.received]
        arrived = collectives.all_to_all(tokens, group, send, receive)
        # What arrives is sorted by rank, then by expert; the experts need it the other way round.
        pieces = arrived.split([size for row in self.received for size in row])
        by_expert = torch.cat([pieces[rank * here + number] for number in range(here) for rank in range(ranks)])
        by_number = list(zip(*self.received, strict=True))
        results = self.dispatcher.experts(by_expert, [sum(sizes) for sizes in by_number])
        parts = results.split([size for sizes in by_number for size in sizes])
        by_rank = torch.cat([parts[number * ranks + rank] for rank in range(ranks) for number in range(here)])
        return collectives.all_to_all(by_rank, group, receive, send)


def apply(module: nn.Module, mesh: Mesh) -> None:
    """Keep only this rank's experts of every mixture of experts, in place."""
    from labkit.workloads.models.experts import MixtureOfExperts

    group = mesh.group("ep")
    assert group is not None
    for part in module.modules():
        if isinstance(part, MixtureOfExperts):
            part.experts.up = shard_parameter(part.experts.up, mesh, "ep", 0)
            part.experts.down = shard_parameter(part.experts.down, mesh, "ep", 0)
            part.exchange = TokenDispatcher(part.experts, group)


def set_sample_weight(module: nn.Module, weight: float) -> None:
    """Set the weight of one sample in the training loss on every mixture, so that its auxiliary loss weighs as much."""
    from labkit.workloads.models.experts import MixtureOfExperts

    for part in module.modules():
        if isinstance(part, MixtureOfExperts):
            part.sample_weight = weight
