"""Context parallelism: the sequence is sharded over ranks, and keys and values go round a ring (Liu et al. 2023,
arXiv:2310.01889).

Every rank keeps its queries and gets the keys and values of all others, one after the other. Attention over a part of
the keys (attention.py) is a weighted mean; two such means are merged by the logarithms of their denominators, so that
no rank ever holds scores for the whole sequence (Milakov & Gimelshein 2018, arXiv:1805.02867).

With a causal mask early positions attend to few others. So the sequence is cut into 2·N chunks, and rank r takes the
chunks r and 2N-1-r: a zig-zag. Whichever rank s the keys come from, exactly half of the scores are needed:

    s = r    the rank's own chunks: causal
    s < r    all queries, the first chunk of keys
    s > r    the queries of the second chunk, all keys

and every rank has the same work in every turn. torch's own context parallelism has no path for CPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from labkit.parallel import collectives
from labkit.parallel.attention import Part, accumulation_dtype, kernel_for
from labkit.parallel.mesh import Mesh
from labkit.parallel.plan import Style, apply_plans

SEQUENCE = 1
"""Dimension of the sequence in activations [N, T, width]."""
_WHOLE, _FIRST, _SECOND = 0, 1, 2
"""Selections of rows or columns of a block of scores: all of them, the first half, the second half."""


def zigzag(x: Tensor, dim: int, index: int, ranks: int) -> Tensor:
    """Return the two chunks of rank `index` of `ranks`, concatenated along `dim`, whose size 2·`ranks` must divide."""
    chunks = x.chunk(2 * ranks, dim)
    return torch.cat([chunks[index], chunks[2 * ranks - 1 - index]], dim)


class Ring:
    """Ring attention among the ranks of a group: a replacement for `scaled_dot_product_attention`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, scale: float | None = None
    ) -> Tensor:
        """Return the attention [N, H, t, D] of this rank's queries over all keys.

        `query`: [N, H, t, D] for the t positions of this rank; `key`, `value`: [N, G, t, D] for the same positions,
        where H may be a multiple of G: each of them then belongs to H/G heads (Ainslie et al. 2023, arXiv:2305.13245).
        """
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        device = query.device.type
        if torch.is_autocast_enabled(device):  # as torch does it for attention
            query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
        out: Tensor = _RingAttention.apply(query, key, value, self.group, is_causal, scale)  # type: ignore[no-untyped-call]
        return out


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup, causal: bool, scale: float
    ) -> Tensor:
        kernel, heads = kernel_for(query), query.shape[1]
        out = torch.zeros_like(query, dtype=accumulation_dtype(query))
        log_sum = out.new_full(query.shape[:-1], -torch.inf)  # logarithm of the softmax's denominator
        for source, block in _ring(torch.stack([key, value]), group):
            rows, columns, masked = _needed(group.rank(), source, causal)
            keys, values = (_for_heads(x, heads) for x in _half(block, columns))
            partial, partial_log_sum = kernel.forward(Part(_half(query, rows), keys, values, masked, scale))
            _merge(_half(out, rows), _half_rows(log_sum, rows), partial, partial_log_sum)
        result = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, result, log_sum)
        ctx.group, ctx.causal, ctx.scale, ctx.kernel = group, causal, scale, kernel
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, value, out, log_sum = ctx.saved_tensors
        group, dtype = ctx.group, accumulation_dtype(query)
        query_grad = torch.zeros_like(query, dtype=dtype)
        # The gradients of keys and values follow them one turn later, and reach their owner after the last turn.
        block_grad = torch.zeros((2, *key.shape), dtype=dtype, device=key.device)
        for source, block in _ring(torch.stack([key, value]), group):
            if source != group.rank():
                block_grad = _pass_on(block_grad, group)
            rows, columns, masked = _needed(group.rank(), source, ctx.causal)
            keys, values = (_for_heads(x, query.shape[1]) for x in _half(block, columns))
            part = Part(_half(query, rows), keys, values, masked, ctx.scale)
            log_sums = _half_rows(log_sum, rows).contiguous()  # as kernels read it
            gradients = ctx.kernel.backward(part, _half(grad, rows), _half(out, rows), log_sums)
            _half(query_grad, rows).add_(gradients[0])
            for total, gradient in zip(_half(block_grad, columns), gradients[1:], strict=True):
                total.add_(_sum_over_heads(gradient, total.shape[1], dtype))
        key_grad, value_grad = _pass_on(block_grad, group)
        return query_grad.to(query.dtype), key_grad.to(key.dtype), value_grad.to(value.dtype), None, None, None


def _merge(out: Tensor, log_sum: Tensor, partial: Tensor, partial_log_sum: Tensor) -> None:
    """Merge the attention over further keys into `out`, and the logarithm of its denominator into `log_sum`."""
    merged = torch.logaddexp(log_sum, partial_log_sum)
    weights = ((x - merged).exp().unsqueeze(-1) for x in (log_sum, partial_log_sum))
    out.copy_(out * next(weights) + partial * next(weights))
    log_sum.copy_(merged)


def _for_heads(x: Tensor, heads: int) -> Tensor:
    """Return keys or values [N, G, s, D] repeated for all heads: [N, heads, s, D]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _sum_over_heads(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Return the gradient [N, groups, s, D] of what `_for_heads` has repeated."""
    return x if x.shape[1] == groups else x.unflatten(1, (groups, -1)).sum(2, dtype=dtype)


def _needed(rank: int, source: int, causal: bool) -> tuple[int, int, bool]:
    """Return which rows and columns of the scores of `rank`'s queries and `source`'s keys are needed, and if masked."""
    if not causal:
        return _WHOLE, _WHOLE, False
    if source == rank:
        return _WHOLE, _WHOLE, True
    return (_WHOLE, _FIRST, False) if source < rank else (_SECOND, _WHOLE, False)


def _half(x: Tensor, selection: int) -> Tensor:
    """Return a view of [..., t, D] with all of t, its first half or its second half."""
    middle = x.shape[-2] // 2
    return (x, x[..., :middle, :], x[..., middle:, :])[selection]


def _half_rows(x: Tensor, selection: int) -> Tensor:
    """Return the same view of [..., t]."""
    return _half(x.unsqueeze(-1), selection).squeeze(-1)


def _ring(block: Tensor, group: dist.ProcessGroup) -> Iterator[tuple[int, Tensor]]:
    """Yield (rank it comes from, block) for every rank of the group, this rank's own block first.

    The next block is sent while the caller works on this one.
    """
    size, rank = group.size(), group.rank()
    for turn in range(size):
        next_block, works = block, list[dist.Work]()
        if turn + 1 < size:
            next_block, works = _start(block, group)
        yield (rank - turn) % size, block
        for work in works:
            work.wait()
        block = next_block


def _pass_on(block: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send the block to the next rank and return the previous rank's."""
    received, works = _start(block, group)
    for work in works:
        work.wait()
    return received


def _start(block: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, list[dist.Work]]:
    """Start to send `block` to the next rank; return where the previous rank's will be, and what to wait for."""
    rank, ranks = group.rank(), dist.get_process_group_ranks(group)
    received, block = torch.empty_like(block), block.contiguous()
    send = dist.P2POp(dist.isend, block, ranks[(rank + 1) % len(ranks)], group)
    receive = dist.P2POp(dist.irecv, received, ranks[rank - 1], group)
    # In a ring of two both neighbours are the same rank: each lists its send first, so that messages stay in order.
    return received, dist.batch_isend_irecv([send, receive])


def apply(module: nn.Module, mesh: Mesh) -> None:
    """Shard the sequence where it enters the model and replace every attention by ring attention, in place.

    Modules say what to do with their parts (`cp_plan`).
    """
    group = mesh.group("cp")
    assert group is not None
    apply_plans(module, "cp_plan", _styles(group, mesh.index("cp"), mesh.size("cp")))


def _styles(group: dist.ProcessGroup, index: int, ranks: int) -> dict[str, Style]:
    """Return what can be done with a part of a module, by the name that plans use: functions of owner and name."""

    def own(x: Tensor, dim: int) -> Tensor:
        return zigzag(x, dim, index, ranks)

    def positions(x: Tensor) -> Tensor:
        return own(torch.arange(x.shape[1] * ranks, device=x.device), 0)

    def gather(module: nn.Module, inputs: Any) -> tuple[Tensor]:
        return (collectives.gather_from_sequence_region(inputs[0], group, SEQUENCE),)

    return {
        "ring": lambda owner, name: setattr(owner, name, Ring(group)),
        "ring_of_transformers": lambda owner, name: _in_transformers(owner.get_submodule(name), Ring(group)),
        "own_part": lambda owner, name: setattr(owner, name, own),
        "own_positions": lambda owner, name: setattr(owner, name, positions),
        "sum": lambda owner, name: setattr(owner, name, partial(collectives.all_reduce_no_grad, group=group)),
        "shard_output": lambda owner, name: owner.register_forward_hook(lambda m, i, out: own(out, SEQUENCE)),
        "gather_input": lambda owner, name: owner.register_forward_pre_hook(gather),
    }


def _in_transformers(attention: Any, ring: Ring) -> None:
    """Make an attention layer of transformers use the ring, through the library's registry of attention functions."""
    from transformers import AttentionInterface

    if getattr(attention, "attention_dropout", 0.0):
        raise ValueError("the ring of context parallelism has no dropout: set attention_dropout to 0")
    AttentionInterface.register("labkit_ring", _ring_of_transformers)
    attention.labkit_ring = ring
    attention.config._attn_implementation = "labkit_ring"


def _ring_of_transformers(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None, **options: Any
) -> tuple[Tensor, None]:
    """Compute ring attention with the signature of transformers.

    `query` is [N, H, t, D], `key` and `value` may have fewer heads; returns [N, t, H, D].
    """
    return module.labkit_ring(query, key, value, is_causal=True, scale=scaling).transpose(1, 2).contiguous(), None
