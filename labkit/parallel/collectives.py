"""Collectives with a gradient: the pairs of Megatron-LM (arXiv:1909.08053, arXiv:2205.05198).

| forward                | backward               | name                                |
|------------------------|------------------------|-------------------------------------|
| identity               | all-reduce             | `copy_to_region`                    |
| all-reduce             | identity               | `reduce_from_region`                |
| all-gather             | reduce-scatter         | `gather_from_sequence_region`       |
| reduce-scatter         | all-gather             | `reduce_scatter_to_sequence_region` |
| all-gather             | keep the local chunk   | `all_gather`                        |
| keep the local chunk   | all-gather             | `split`                             |
| all-to-all             | all-to-all             | `all_to_all`                        |

`copy_to_region` and `reduce_from_region` (Megatron's f and g) enclose a tensor-parallel region. With sequence
parallelism the next two replace them: they send the same bytes, but the activations between two regions are sharded
too. `all_gather` and `split` are for computations that every rank repeats.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup


def all_reduce_no_grad(x: Tensor, group: Group) -> Tensor:
    """Return the sum of `x` over all ranks of `group`; no gradient flows through it."""
    x = x.contiguous().clone()
    dist.all_reduce(x, group=group)
    return x


def all_gather_no_grad(x: Tensor, group: Group, dim: int) -> Tensor:
    """Concatenate the `x` of all ranks along `dim`, in the order of their ranks; no gradient flows through it."""
    moved = x.movedim(dim, 0).contiguous()
    out = moved.new_empty((group.size() * moved.shape[0], *moved.shape[1:]))
    dist.all_gather_into_tensor(out, moved, group=group)
    # Contiguous: otherwise each layer that reads it would make its own copy and keep that for its backward pass.
    return out.movedim(0, dim).contiguous()


def _reduce_scatter(x: Tensor, group: Group, dim: int) -> Tensor:
    moved = x.movedim(dim, 0).contiguous()
    out = moved.new_empty((moved.shape[0] // group.size(), *moved.shape[1:]))
    dist.reduce_scatter_tensor(out, moved, group=group)
    return out.movedim(0, dim).contiguous()


def _local_chunk(x: Tensor, group: Group, dim: int) -> Tensor:
    return x.chunk(group.size(), dim)[group.rank()].contiguous()


class _CopyToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return all_reduce_no_grad(grad, ctx.group), None


class _ReduceFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return all_reduce_no_grad(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _PairedCollectives(torch.autograd.Function):
    """Apply one collective in the forward pass and another in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int, collective: Any, backward_collective: Any) -> Tensor:
        ctx.group, ctx.dim, ctx.backward_collective = group, dim, backward_collective
        out: Tensor = collective(x, group, dim)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.backward_collective(grad, ctx.group, ctx.dim), None, None, None, None


class _AllToAll(torch.autograd.Function):
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


def copy_to_region(x: Tensor, group: Group) -> Tensor:
    """Enter a tensor-parallel region: return `x`; its gradient is all-reduced in the backward pass."""
    return _apply(_CopyToRegion, x, group)


def reduce_from_region(x: Tensor, group: Group) -> Tensor:
    """Leave a tensor-parallel region: all-reduce the partial results `x`; their gradient passes unchanged."""
    return _apply(_ReduceFromRegion, x, group)


def gather_from_sequence_region(x: Tensor, group: Group, dim: int) -> Tensor:
    """Enter a tensor-parallel region from activations sharded along `dim`: all-gather; backward reduce-scatter."""
    return _apply(_PairedCollectives, x, group, dim, all_gather_no_grad, _reduce_scatter)


def reduce_scatter_to_sequence_region(x: Tensor, group: Group, dim: int) -> Tensor:
    """Leave a tensor-parallel region to activations sharded along `dim`: reduce-scatter; backward all-gather."""
    return _apply(_PairedCollectives, x, group, dim, _reduce_scatter, all_gather_no_grad)


def all_gather(x: Tensor, group: Group, dim: int) -> Tensor:
    """All-gather `x` along `dim` for a computation that every rank repeats; backward keeps the local chunk."""
    return _apply(_PairedCollectives, x, group, dim, all_gather_no_grad, _local_chunk)


def split(x: Tensor, group: Group, dim: int) -> Tensor:
    """Keep this rank's chunk along `dim` of a tensor that every rank has computed; backward all-gathers."""
    return _apply(_PairedCollectives, x, group, dim, _local_chunk, all_gather_no_grad)


def all_to_all(x: Tensor, group: Group, send: list[int], receive: list[int]) -> Tensor:
    """Send `send[r]` consecutive rows of `x` to each rank r, in order; return the `receive[r]` rows from each rank r.

    The backward pass sends the gradients back.
    """
    return _apply(_AllToAll, x, group, send, receive)
