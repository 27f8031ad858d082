"""A mixture of experts in place of an MLP (Shazeer et al. 2017, arXiv:1701.06538; as in Mixtral, arXiv:2401.04088).

A router scores the experts for each token; the `k` best ones process it, weighted by the softmax of their k scores.
Nothing is dropped and nothing depends on the other tokens, so that splitting a batch over ranks changes nothing. There
is no load-balancing loss for the same reason: it is no mean over samples.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from labkit.workloads.models.transformer import MLP


class MixtureOfExperts(nn.Module):
    """out = Σ over the k chosen experts of weight · expert(x): [N, T, width] to [N, T, width], on one rank."""

    def __init__(self, width: int, experts: int, experts_per_token: int) -> None:
        super().__init__()
        if not 1 <= experts_per_token <= experts:
            raise ValueError(f"{experts_per_token} experts per token of {experts} experts")
        self.experts_per_token = experts_per_token
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(MLP(width) for _ in range(experts))

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and numbers of the chosen experts, both [tokens, k]; the best expert first."""
        scores, chosen = self.router(tokens).topk(self.experts_per_token, dim=-1)
        return scores.softmax(-1), chosen

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        weights, chosen = self.route(tokens)
        k, width = self.experts_per_token, tokens.shape[-1]
        # Sort the (token, expert) pairs by expert, run each expert on its own stretch, and put the results back. Only
        # permutations move data, so the backward pass adds nothing in an undefined order.
        order = chosen.flatten().argsort(stable=True)
        back = order.argsort()
        copies = tokens.unsqueeze(1).expand(-1, k, -1).reshape(-1, width)[order]
        sizes = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        # An expert without tokens runs on an empty stretch: its gradient is zero rather than missing.
        stretches = copies.split(sizes)
        results = torch.cat([expert(part) for expert, part in zip(self.experts, stretches, strict=True)])
        out: Tensor = (results[back].unflatten(0, (-1, k)) * weights.unsqueeze(-1)).sum(1)
        return out.view_as(x)
