"""The transformer layer that the vision transformer and the GPT share: pre-norm attention, then a pre-norm MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from labkit.workloads.base import Plan

Mix = Callable[..., Tensor]


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, arXiv:1706.03762): [N, T, width] to [N, T, width].

    With `causal`, position t attends to positions 0 … t only. `mix` computes the attention: query, key and value [N, H,
    T, D] to [N, H, T, D]; context parallelism replaces it by ring attention.
    """

    tp_plan: ClassVar[Plan] = (
        *(("query", "colwise"), ("key", "colwise"), ("value", "colwise")),
        *(("out", "rowwise"), ("", "enter")),
    )
    cp_plan: ClassVar[Plan] = (("mix", "ring"),)

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}")
        self.heads, self.causal = heads, causal
        self.mix: Mix = nn.functional.scaled_dot_product_attention
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (self._split(part(x)) for part in (self.query, self.key, self.value))
        mixed = self.mix(query, key, value, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """Reshape [N, T, H·D] to [N, H, T, D]. The head size is fixed, H is not: tensor parallelism shards H."""
        return x.unflatten(-1, (-1, self.query.in_features // self.heads)).transpose(1, 2)


class MLP(nn.Module):
    """Linear to `hidden` (default 4·width), GELU, linear back, at each position separately."""

    tp_plan: ClassVar[Plan] = (("up", "colwise"), ("down", "rowwise"), ("", "enter"))

    def __init__(self, width: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = hidden or 4 * width
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): [N, T, width] to [N, T, width]."""

    tp_plan: ClassVar[Plan] = (("attention_norm", "sequence_parallel"), ("mlp_norm", "sequence_parallel"))

    def __init__(self, width: int, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = attention
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out
