"""Attention over a part of the keys, by the fused kernel of the device: what a ring of ranks computes in each turn.

A fused kernel (FlashAttention, Dao et al. 2022, arXiv:2205.14135) holds no matrix of scores, and returns with the
attention the logarithm of each row's softmax denominator. With that number attentions over several parts of the keys
are merged, and with the one of the whole row the backward pass of any part is exact: softmax weights are
exp(score - logarithm of the denominator), whichever part they belong to.

`Flash` and `FlashOnCpu` call torch's kernels, `Dense` computes the same with products of matrices: on GPUs in float32
and float64, and for sizes of heads that the kernels do not take.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

_aten = torch.ops.aten
_HEAD_MULTIPLE, _LARGEST_HEAD = 8, 256
"""Sizes of a head that FlashAttention's kernels for GPUs take."""


class Part(NamedTuple):
    """Queries and the part of the keys that they attend to in one turn."""

    query: Tensor
    """[N, H, t, D]"""
    key: Tensor
    """[N, H, s, D]"""
    value: Tensor
    """[N, H, s, D]"""
    causal: bool
    """Whether position i attends to keys 0 … i only; then t = s."""
    scale: float
    """Factor of the scores."""


Gradients = tuple[Tensor, Tensor, Tensor]
"""Of query, key and value."""


class Kernel(Protocol):
    """Computes the attention [N, H, t, D] of a part, and the natural logarithms of its denominators [N, H, t]."""

    def forward(self, part: Part) -> tuple[Tensor, Tensor]:
        """Return the attention over these keys, and the logarithms of its denominators in at least float32."""
        ...

    def backward(self, part: Part, grad: Tensor, out: Tensor, log_sum: Tensor) -> Gradients:
        """Return what these keys contribute to the gradients.

        `grad`, `out` and `log_sum` belong to the attention over all keys, of which these are a part.
        """
        ...


class FlashOnCpu:
    """torch's FlashAttention for CPUs, in all floating-point formats."""

    def forward(self, part: Part) -> tuple[Tensor, Tensor]:
        *tensors, causal, scale = part
        out, log_sum = _aten._scaled_dot_product_flash_attention_for_cpu(*tensors, 0.0, causal, scale=scale)
        return out, log_sum

    def backward(self, part: Part, grad: Tensor, out: Tensor, log_sum: Tensor) -> Gradients:
        *tensors, causal, scale = part
        gradients: Gradients = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, *tensors, out, log_sum, 0.0, causal, scale=scale
        )
        return gradients


class Flash:
    """FlashAttention on GPUs, in 16 bits."""

    def __init__(self) -> None:
        self._rest: Any = None
        """What the backward pass wants back, though nothing is in it: lengths of sequences, random state of dropout."""

    def forward(self, part: Part) -> tuple[Tensor, Tensor]:
        *tensors, causal, scale = part
        results: Any = _aten._scaled_dot_product_flash_attention(*tensors, 0.0, causal, False, scale=scale)
        self._rest = results[2:4], results[6:8]
        return results[0], results[1]

    def backward(self, part: Part, grad: Tensor, out: Tensor, log_sum: Tensor) -> Gradients:
        *tensors, causal, scale = part
        lengths, random_state = self._rest
        sizes = part.query.shape[-2], part.key.shape[-2]
        gradients: Gradients = _aten._scaled_dot_product_flash_attention_backward(
            grad, *tensors, out, log_sum, *lengths, *sizes, 0.0, causal, *random_state, scale=scale
        )
        return gradients


class Dense:
    """Products of matrices with all scores of these queries and keys in at least float32."""

    def forward(self, part: Part) -> tuple[Tensor, Tensor]:
        scores = _scores(part)
        log_sum = scores.logsumexp(-1)
        return (scores - log_sum.unsqueeze(-1)).exp().to(part.value.dtype) @ part.value, log_sum

    def backward(self, part: Part, grad: Tensor, out: Tensor, log_sum: Tensor) -> Gradients:
        query, key, value, _, scale = part
        probabilities = (_scores(part) - log_sum.unsqueeze(-1)).exp()
        value_grad = probabilities.to(grad.dtype).transpose(-2, -1) @ grad
        mean = (grad * out).sum(-1, keepdim=True, dtype=probabilities.dtype)  # of the scores' gradient in each row
        scores_grad = (probabilities * ((grad @ value.transpose(-2, -1)) - mean) * scale).to(query.dtype)
        return scores_grad @ key, scores_grad.transpose(-2, -1) @ query, value_grad


def kernel_for(query: Tensor) -> Kernel:
    """Return the kernel for queries on this device, in this format and with heads of this size."""
    if query.device.type == "cpu":
        return FlashOnCpu()
    head = query.shape[-1]
    fits = head % _HEAD_MULTIPLE == 0 and head <= _LARGEST_HEAD
    return Flash() if fits and query.dtype in (torch.float16, torch.bfloat16) else Dense()


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which sums over parts are kept: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def _scores(part: Part) -> Tensor:
    scores = (part.query @ part.key.transpose(-2, -1)).to(accumulation_dtype(part.query)) * part.scale
    if part.causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores.masked_fill_(hidden, -torch.inf)
    return scores
