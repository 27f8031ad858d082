"""Context parallelism: the sequence is cut over ranks, and keys and values go round a ring (Liu et al. 2023,
arXiv:2310.01889).

Every rank keeps its queries and meets the keys and values of all others, one after the other. Attention over a part of
the keys is a weighted mean; two such means are merged by the logarithms of their denominators, so that no rank ever
holds scores for the whole sequence (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135).

With a causal mask early positions have little to look at. So the sequence is cut into 2·N chunks, and rank r takes the
chunks r and 2N-1-r: a zig-zag. Whatever rank s the keys come from, exactly half of the scores are needed:

    s = r    the own chunks: causal
    s < r    all queries, the first chunk of keys
    s > r    the queries of the second chunk, all keys

and every rank has the same work in every turn. torch's own context parallelism has no path for CPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from labkit.parallel import collectives
from labkit.parallel.mesh import Mesh

SEQUENCE = 1
"""Dimension of the sequence in activations [N, T, width]."""
_WHOLE, _FIRST, _SECOND = 0, 1, 2
"""Which rows or columns of a block of scores are needed."""


def zigzag(x: Tensor, dim: int, index: int, parts: int) -> Tensor:
    """The two chunks of rank `index` of `parts`, one after the other along `dim`, which 2·`parts` divides."""
    chunks = x.chunk(2 * parts, dim)
    return torch.cat([chunks[index], chunks[2 * parts - 1 - index]], dim)


class Ring:
    """Attention among the ranks of a group: takes the place of `scaled_dot_product_attention`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, scale: float | None = None
    ) -> Tensor:
        """[N, H, t, D] of this rank's part of the sequence each, to [N, H, t, D]."""
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        out: Tensor = _RingAttention.apply(query, key, value, self.group, is_causal, scale)  # type: ignore[no-untyped-call]
        return out


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup, causal: bool, scale: float
    ) -> Tensor:
        out = torch.zeros_like(query, dtype=_sum_type(query))
        weight = out.new_full(query.shape[:-1], -torch.inf)  # logarithm of the softmax's denominator
        for source, block in _round(torch.stack([key, value]), group):
            rows, columns, masked = _needed(group.rank(), source, causal)
            keys, values = _half(block, columns)
            part, part_weight = _attend(_half(query, rows), keys, values, scale, masked)
            held, held_weight = _half(out, rows), _half(weight.unsqueeze(-1), rows)
            both = torch.logaddexp(held_weight, part_weight)
            held.copy_(held * (held_weight - both).exp() + part * (part_weight - both).exp())
            held_weight.copy_(both)
        result = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, result, weight)
        ctx.group, ctx.causal, ctx.scale = group, causal, scale
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, value, out, weight = ctx.saved_tensors
        group, scale, kind = ctx.group, ctx.scale, _sum_type(query)
        pull = (grad * out).sum(-1, keepdim=True, dtype=kind)
        query_grad = torch.zeros_like(query, dtype=kind)
        # The gradients of keys and values travel one turn behind them, and arrive at home after the last one.
        block_grad = torch.zeros((2, *key.shape), dtype=kind, device=key.device)
        for source, block in _round(torch.stack([key, value]), group):
            if source != group.rank():
                block_grad = _pass_on(block_grad, group)
            rows, columns, masked = _needed(group.rank(), source, ctx.causal)
            keys, values = _half(block, columns)
            mine = _half(query, rows), _half(grad, rows), _half(pull, rows), _half(weight.unsqueeze(-1), rows)
            parts = _attend_backward(*mine, keys, values, scale, masked)
            for total, part in zip((query_grad, *block_grad), parts, strict=True):
                _half(total, rows if total is query_grad else columns).add_(part)
        key_grad, value_grad = _pass_on(block_grad, group)
        return query_grad.to(query.dtype), key_grad.to(key.dtype), value_grad.to(value.dtype), None, None, None


def _sum_type(x: Tensor) -> torch.dtype:
    """Sums of half precision are kept in single precision."""
    return torch.promote_types(x.dtype, torch.float32)


def _needed(rank: int, source: int, causal: bool) -> tuple[int, int, bool]:
    """Rows and columns of the scores between `rank`'s queries and `source`'s keys that are needed, and the mask."""
    if not causal:
        return _WHOLE, _WHOLE, False
    if source == rank:
        return _WHOLE, _WHOLE, True
    return (_WHOLE, _FIRST, False) if source < rank else (_SECOND, _WHOLE, False)


def _half(x: Tensor, which: int) -> Tensor:
    """A view of [..., t, D]: all of t, its first or its second half."""
    middle = x.shape[-2] // 2
    return (x, x[..., :middle, :], x[..., middle:, :])[which]


def _scores(query: Tensor, key: Tensor, scale: float, masked: bool) -> Tensor:
    scores = (query @ key.transpose(-2, -1)).to(_sum_type(query)) * scale
    if masked:
        scores.masked_fill_(torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1), -torch.inf)
    return scores


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, masked: bool) -> tuple[Tensor, Tensor]:
    """Attention over some keys, and the logarithm of its denominator [..., t, 1]."""
    scores = _scores(query, key, scale, masked)
    weight = scores.logsumexp(-1, keepdim=True)
    return (scores - weight).exp().to(value.dtype) @ value, weight


def _attend_backward(
    query: Tensor, grad: Tensor, pull: Tensor, weight: Tensor, key: Tensor, value: Tensor, scale: float, masked: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from these keys; `weight` is the logarithm of the whole denominator."""
    shares = (_scores(query, key, scale, masked) - weight).exp()
    value_grad = shares.to(grad.dtype).transpose(-2, -1) @ grad
    scores_grad = (shares * ((grad @ value.transpose(-2, -1)) - pull) * scale).to(query.dtype)
    return scores_grad @ key, scores_grad.transpose(-2, -1) @ query, value_grad


def _round(block: Tensor, group: dist.ProcessGroup) -> Iterator[tuple[int, Tensor]]:
    """(rank it comes from, block) of every rank of the group, the own first.

    The next block travels while the caller works on this one.
    """
    size, rank = group.size(), group.rank()
    for turn in range(size):
        coming, works = block, list[dist.Work]()
        if turn + 1 < size:
            coming, works = _start(block, group)
        yield (rank - turn) % size, block
        for work in works:
            work.wait()
        block = coming


def _pass_on(block: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Give the block to the next rank and take the previous one's."""
    coming, works = _start(block, group)
    for work in works:
        work.wait()
    return coming


def _start(block: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, list[dist.Work]]:
    rank, ranks = group.rank(), dist.get_process_group_ranks(group)
    coming, block = torch.empty_like(block), block.contiguous()
    there = dist.P2POp(dist.isend, block, ranks[(rank + 1) % len(ranks)], group)
    back = dist.P2POp(dist.irecv, coming, ranks[rank - 1], group)
    # Neighbours of a ring of two are one rank: whoever comes first sends first, so that messages keep their order.
    return coming, dist.batch_isend_irecv([there, back])


def apply(module: nn.Module, mesh: Mesh) -> None:
    """Cut the sequence where it enters the model and let every attention go round the ring, in place."""
    from labkit.workloads.models.decoder import DecoderEmbedding, DecoderLayer
    from labkit.workloads.models.experts import MixtureOfExperts
    from labkit.workloads.models.gpt import TokenEmbedding
    from labkit.workloads.models.transformer import Attention
    from labkit.workloads.models.vit import MeanHead, PatchEmbedding

    group = mesh.group("cp")
    assert group is not None
    index, parts = mesh.index("cp"), mesh.size("cp")

    def own(x: Tensor, dim: int) -> Tensor:
        return zigzag(x, dim, index, parts)

    for part in module.modules():
        if isinstance(part, Attention):
            part.mix = Ring(group)
        elif isinstance(part, TokenEmbedding | DecoderEmbedding):
            part.cut_sequence = own
        elif isinstance(part, DecoderLayer):
            part.positions = lambda x: own(torch.arange(x.shape[1] * parts, device=x.device), 0)
            _in_transformers(part.layer.self_attn, Ring(group))
        elif isinstance(part, MixtureOfExperts):
            part.over_parts = lambda counts: collectives.all_reduce_no_grad(counts, group)
        elif isinstance(part, PatchEmbedding):
            part.register_forward_hook(lambda m, i, out: own(out, SEQUENCE))
        elif isinstance(part, MeanHead):  # its mean over the patches asks for all of them, in any order
            part.register_forward_pre_hook(
                lambda m, i: (collectives.gather_from_sequence_region(i[0], group, SEQUENCE),)
            )


def _in_transformers(attention: Any, ring: Ring) -> None:
    """Let an attention of transformers go round the ring, by the library's own register of attention functions."""
    from transformers import AttentionInterface

    if getattr(attention, "attention_dropout", 0.0):
        raise ValueError("the ring of context parallelism has no dropout: set attention_dropout to 0")
    AttentionInterface.register("labkit_ring", _ring_of_transformers)
    attention.labkit_ring = ring
    attention.config._attn_implementation = "labkit_ring"


def _ring_of_transformers(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None, **options: Any
) -> tuple[Tensor, None]:
    """Signature of the library: [N, H, t, D], with fewer heads of keys and values, to [N, t, H, D]."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return module.labkit_ring(query, key, value, is_causal=True, scale=scaling).transpose(1, 2).contiguous(), None
