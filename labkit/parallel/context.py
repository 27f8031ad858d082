"""Context parallelism: the sequence is sharded over ranks, and keys and values go round a ring (Liu et al. 2023,
arXiv:2310.01889).

Every rank keeps its queries and gets the keys and values of all others, one after the other. Attention over a part of
the keys is a weighted mean; two such means are merged by the logarithms of their denominators, so that no rank ever
holds scores for the whole sequence (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135).

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

        `query`, `key`, `value`: [N, H, t, D] each, for the t positions of this rank.
        """
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        out: Tensor = _RingAttention.apply(query, key, value, self.group, is_causal, scale)  # type: ignore[no-untyped-call]
        return out


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup, causal: bool, scale: float
    ) -> Tensor:
        out = torch.zeros_like(query, dtype=_accumulation_dtype(query))
        log_sum = out.new_full(query.shape[:-1], -torch.inf)  # logarithm of the softmax's denominator
        for source, block in _ring(torch.stack([key, value]), group):
            rows, columns, masked = _needed(group.rank(), source, causal)
            keys, values = _half(block, columns)
            partial, partial_log_sum = _attend(_half(query, rows), keys, values, scale, masked)
            total, total_log_sum = _half(out, rows), _half(log_sum.unsqueeze(-1), rows)
            merged = torch.logaddexp(total_log_sum, partial_log_sum)
            total.copy_(total * (total_log_sum - merged).exp() + partial * (partial_log_sum - merged).exp())
            total_log_sum.copy_(merged)
        result = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, result, log_sum)
        ctx.group, ctx.causal, ctx.scale = group, causal, scale
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, value, out, log_sum = ctx.saved_tensors
        group, scale, dtype = ctx.group, ctx.scale, _accumulation_dtype(query)
        correction = (grad * out).sum(-1, keepdim=True, dtype=dtype)  # of the softmax's gradient, one number per row
        query_grad = torch.zeros_like(query, dtype=dtype)
        # The gradients of keys and values follow them one turn later, and reach their owner after the last turn.
        block_grad = torch.zeros((2, *key.shape), dtype=dtype, device=key.device)
        for source, block in _ring(torch.stack([key, value]), group):
            if source != group.rank():
                block_grad = _pass_on(block_grad, group)
            rows, columns, masked = _needed(group.rank(), source, ctx.causal)
            keys, values = _half(block, columns)
            own = _half(query, rows), _half(grad, rows), _half(correction, rows), _half(log_sum.unsqueeze(-1), rows)
            partials = _attend_backward(*own, keys, values, scale, masked)
            for total, part in zip((query_grad, *block_grad), partials, strict=True):
                _half(total, rows if total is query_grad else columns).add_(part)
        key_grad, value_grad = _pass_on(block_grad, group)
        return query_grad.to(query.dtype), key_grad.to(key.dtype), value_grad.to(value.dtype), None, None, None


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which to accumulate: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


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


def _scores(query: Tensor, key: Tensor, scale: float, masked: bool) -> Tensor:
    scores = (query @ key.transpose(-2, -1)).to(_accumulation_dtype(query)) * scale
    if masked:
        scores.masked_fill_(torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1), -torch.inf)
    return scores


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, masked: bool) -> tuple[Tensor, Tensor]:
    """Return the attention over some keys, and the logarithm of its denominator [..., t, 1]."""
    scores = _scores(query, key, scale, masked)
    log_sum = scores.logsumexp(-1, keepdim=True)
    return (scores - log_sum).exp().to(value.dtype) @ value, log_sum


def _attend_backward(
    query: Tensor,
    grad: Tensor,
    correction: Tensor,
    log_sum: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    masked: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value from these keys; `log_sum`: logarithm of the whole denominator."""
    probabilities = (_scores(query, key, scale, masked) - log_sum).exp()
    value_grad = probabilities.to(grad.dtype).transpose(-2, -1) @ grad
    scores_grad = (probabilities * ((grad @ value.transpose(-2, -1)) - correction) * scale).to(query.dtype)
    return scores_grad @ key, scores_grad.transpose(-2, -1) @ query, value_grad


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
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return module.labkit_ring(query, key, value, is_causal=True, scale=scaling).transpose(1, 2).contiguous(), None
