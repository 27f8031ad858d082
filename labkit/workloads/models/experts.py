"""A mixture of experts in place of an MLP (Shazeer et al. 2017, arXiv:1701.06538; as in Mixtral, arXiv:2401.04088).

A router scores the experts for each token; the `k` best ones process it, weighted by the softmax of their k scores.

Nothing here depends on which other *samples* are in the batch: capacity and balance are counted within each sequence
(as the sequence-wise loss of DeepSeek-V3, arXiv:2412.19437). So splitting a batch over ranks, micro-batches or passes
changes nothing, and every layout can be compared with one process. Common implementations count within whatever batch a
rank happens to have, and their result changes with the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from labkit.workloads.base import Plan


class Exchange(Protocol):
    """One forward pass of the experts on other ranks."""

    @property
    def sizes(self) -> list[int]:
        """Number of this rank's tokens for each of all experts."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """Run tokens [rows, width], sorted by expert, through their experts and return the results [rows, width]."""


class Experts(nn.Module):
    """A batch of `experts` two-layer networks without biases, so that they can be distributed over ranks."""

    tp_plan: ClassVar[Plan] = (("up", "dim 1"), ("down", "dim 2"), ("", "enter_whole"), ("", "reduce_output"))

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, 4 * width, width) * width**-0.5)
        self.down = nn.Parameter(torch.randn(experts, width, 4 * width) * (4 * width) ** -0.5)

    def forward(self, tokens: Tensor, sizes: list[int]) -> Tensor:
        # An expert without tokens runs on an empty slice: its gradient is zero rather than missing.
        parts = zip(tokens.split(sizes), self.up.unbind(), self.down.unbind(), strict=True)
        linear = nn.functional.linear
        return torch.cat([linear(nn.functional.gelu(linear(part, up)), down) for part, up, down in parts])


class MixtureOfExperts(nn.Module):
    """out = Σ over the k chosen experts of weight · expert(x): [N, T, width] to [N, T, width].

    `capacity`: an expert takes at most ⌈capacity · k·T/E⌉ tokens of each sequence, earlier tokens before later ones;
    the rest is dropped, and its share of the result is zero. 0 for no limit. GShard (arXiv:2006.16668) takes all first
    choices before any second one; then a later token can displace an earlier one, and the layer is not causal.

    `balance_loss`: factor of E/(k·T) · Σ_e (tokens that chose e) · (mean probability of e), summed over sequences. It
    affects the gradient only; the reported loss stays comparable.
    """

    tp_plan: ClassVar[Plan] = (("", "gather_input"), ("", "shard_output"))
    """Every rank routes all tokens: otherwise the router would see other shares of an expert's queue."""
    cp_plan: ClassVar[Plan] = (("sum_over_sequence_ranks", "sum"),)

    def __init__(
        self, width: int, experts: int, experts_per_token: int, capacity: float = 0.0, balance_loss: float = 0.0
    ) -> None:
        super().__init__()
        if not 1 <= experts_per_token <= experts:
            raise ValueError(f"{experts_per_token} experts per token of {experts} experts")
        self.experts_per_token, self.capacity, self.balance_loss = experts_per_token, capacity, balance_loss
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = Experts(width, experts)
        self.exchange: Callable[[Tensor], Exchange] | None = None
        """Prepares an exchange from the number of tokens for each expert, int64 [experts]; set by expert parallelism.

        None for local experts.
        """
        self.sample_weight = 1.0
        """Weight of one sample in the loss of the backward pass (1/global batch in one process)."""
        self.sum_over_sequence_ranks: Callable[[Tensor], Tensor] = lambda counts: counts
        """Sums counts over the ranks that have parts of the same sequences (context parallelism)."""
        self.load: Tensor | None = None
        """If it is a tensor [experts] of int64, each forward pass adds the number of choices of each expert."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)  # [N, T, E]
        best, chosen = scores.topk(self.experts_per_token, dim=-1)  # the best expert first
        if self.load is not None:
            self.load += _count(chosen.flatten(), len(self.load))
        if self.balance_loss and torch.is_grad_enabled():
            x = _with_auxiliary_loss(x, self._imbalance(scores, chosen), self.balance_loss * self.sample_weight)
        weights = best.softmax(-1).flatten(0, -2)  # [N·T, k]
        tokens, k = x.flatten(0, -2), self.experts_per_token
        # Sort the pairs of token and choice by expert, run each expert on its own slice, and put the results back.
        # Only permutations move data, so the backward pass adds nothing in an undefined order.
        flat, experts = chosen.flatten(), scores.shape[-1]
        if self.capacity:  # what is dropped is sorted behind the last expert
            flat = flat.where(self._within_capacity(chosen).flatten(), experts)
        counts = _count(flat, experts + 1)[:experts]
        exchange = None if self.exchange is None else self.exchange(counts)
        sizes = counts.tolist() if exchange is None else exchange.sizes  # here the host waits for the device
        order = flat.argsort(stable=True)[: sum(sizes)]
        copies = tokens.unsqueeze(1).expand(-1, k, -1).flatten(0, 1)[order]
        results = self.experts(copies, sizes) if exchange is None else exchange(copies)
        placed = results.new_zeros(len(flat), results.shape[-1]).index_copy(0, order, results)
        out: Tensor = (placed.unflatten(0, (-1, k)) * weights.unsqueeze(-1)).sum(1).to(results.dtype)
        return out.view_as(x)

    def _within_capacity(self, chosen: Tensor) -> Tensor:
        """Return which pairs fit into the capacity: chosen [N, T, k] to bool [N, T, k]."""
        _, length, k = chosen.shape
        experts = self.router.out_features
        room = math.ceil(self.capacity * k * length / experts)
        queue = chosen.flatten(1)  # token by token, each with its first choice first: [N, T·k]
        place = nn.functional.one_hot(queue, experts).cumsum(1).gather(2, queue.unsqueeze(-1)).squeeze(-1)
        return (place <= room).unflatten(1, (length, k))

    def _imbalance(self, scores: Tensor, chosen: Tensor) -> Tensor:
        """Return Σ over sequences of E/(k·T²) · Σ_e count_e · Σ_t probability; 1 per sequence for an even choice."""
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # bfloat16 counts to 256 only
        experts, length = scores.shape[-1], scores.shape[1]
        counts = nn.functional.one_hot(chosen.flatten(1), experts).sum(1).to(scores.dtype)  # [N, E]
        sizes = self.sum_over_sequence_ranks(torch.cat([counts, counts.new_full((len(counts), 1), length)], dim=1))
        share, full_length = sizes[:, :-1], sizes[:, -1:]
        summed = scores.softmax(-1).sum(1)  # [N, E], this rank's tokens
        return (experts / self.experts_per_token * share * summed / full_length**2).sum()


def _count(values: Tensor, kinds: int) -> Tensor:
    """Return how often each of 0 … kinds-1 occurs, int64 [kinds]. On a GPU `bincount` would wait for its result."""
    return values.new_zeros(kinds).scatter_add_(0, values, torch.ones_like(values))


def _with_auxiliary_loss(x: Tensor, loss: Tensor, factor: float) -> Tensor:
    """Return `x`; in the backward pass the gradient of `factor · loss` is added."""
    out: Tensor = _AuxiliaryLoss.apply(x, loss, factor)  # type: ignore[no-untyped-call]
    return out


class _AuxiliaryLoss(torch.autograd.Function):
    """Identity on `x` that passes `factor` as the gradient of `loss` in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, factor: float) -> Tensor:
        ctx.factor, ctx.loss = factor, loss
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, torch.full_like(ctx.loss, ctx.factor), None
