"""Collectives with a gradient: the pairs of Megatron-LM (arXiv:1909.08053, arXiv:2205.05198).

| forward                  | backward                 | name              |
|--------------------------|--------------------------|-------------------|
| nothing                  | sum                      | `enter`           |
| sum                      | nothing                  | `leave`           |
| gather a dimension       | sum, keep the own part   | `gather_sum`      |
| sum, keep the own part   | gather                   | `sum_scatter`     |
| gather a dimension       | keep the own part        | `gather`          |
| keep the own part        | gather                   | `scatter`         |
| give each rank its rows  | the rows come back       | `exchange`        |

`enter` and `leave` stand around a tensor-parallel region; with sequence parallelism `gather_sum` and `sum_scatter` take
their places: the same bytes, but the activations between the regions are cut too. `gather` and `scatter` stand where
every rank goes on with the same computation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup


def summed(x: Tensor, group: Group) -> Tensor:
    """The sum over all ranks; without a gradient."""
    x = x.contiguous().clone()
    dist.all_reduce(x, group=group)
    return x


def gathered(x: Tensor, group: Group, dim: int) -> Tensor:
    """The parts of all ranks, one after the other along `dim`; without a gradient."""
    moved = x.movedim(dim, 0).contiguous()
    out = moved.new_empty((group.size() * moved.shape[0], *moved.shape[1:]))
    dist.all_gather_into_tensor(out, moved, group=group)
    # Contiguous: each layer that reads it would make a copy of its own otherwise, and keep it for its backward pass.
    return out.movedim(0, dim).contiguous()


def _sum_scatter(x: Tensor, group: Group, dim: int) -> Tensor:
    moved = x.movedim(dim, 0).contiguous()
    out = moved.new_empty((moved.shape[0] // group.size(), *moved.shape[1:]))
    dist.reduce_scatter_tensor(out, moved, group=group)
    return out.movedim(0, dim).contiguous()


def _own(x: Tensor, group: Group, dim: int) -> Tensor:
    return x.chunk(group.size(), dim)[group.rank()].contiguous()


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return summed(grad, ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return summed(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _Pair(torch.autograd.Function):
    """One operation forward, another one backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int, there: Any, back: Any) -> Tensor:
        ctx.group, ctx.dim, ctx.back = group, dim, back
        out: Tensor = there(x, group, dim)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.back(grad, ctx.group, ctx.dim), None, None, None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, send: list[int], receive: list[int]) -> Tensor:
        ctx.group, ctx.send, ctx.receive = group, send, receive
        return _all_to_all(x, group, send, receive)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _all_to_all(grad, ctx.group, ctx.receive, ctx.send), None, None, None


def _all_to_all(x: Tensor, group: Group, send: list[int], receive: list[int]) -> Tensor:
    out = x.new_empty((sum(receive), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
    return out


def _apply(function: Any, *inputs: Any) -> Tensor:
    out: Tensor = function.apply(*inputs)
    return out


def enter(x: Tensor, group: Group) -> Tensor:
    """Into a region in which each rank computes a part."""
    return _apply(_Enter, x, group)


def leave(x: Tensor, group: Group) -> Tensor:
    """Out of that region: the sum of the parts."""
    return _apply(_Leave, x, group)


def gather_sum(x: Tensor, group: Group, dim: int) -> Tensor:
    """As `enter`, from activations that are cut along `dim`."""
    return _apply(_Pair, x, group, dim, gathered, _sum_scatter)


def sum_scatter(x: Tensor, group: Group, dim: int) -> Tensor:
    """As `leave`, to activations that are cut along `dim`."""
    return _apply(_Pair, x, group, dim, _sum_scatter, gathered)


def gather(x: Tensor, group: Group, dim: int) -> Tensor:
    """Whole again, for a computation that all ranks repeat."""
    return _apply(_Pair, x, group, dim, gathered, _own)


def scatter(x: Tensor, group: Group, dim: int) -> Tensor:
    """Keep the own part of what all ranks have computed."""
    return _apply(_Pair, x, group, dim, _own, gathered)


def exchange(x: Tensor, group: Group, send: list[int], receive: list[int]) -> Tensor:
    """`send[r]` of the rows of x go to rank r, one stretch after the other; `receive[r]` rows come from it."""
    return _apply(_Exchange, x, group, send, receive)
