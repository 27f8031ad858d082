"""A causal model of `transformers` as a chain of blocks, so that layouts can split it.

The blocks are the library's own modules, in labkit's order. This is valid for models that are embedding → layers with
rotary positions and a plain causal mask → norm → output layer (`language.CHAINED`). Weights get the names of the chain:
`blocks.layer_0.layer.self_attn.q_proj.weight`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from labkit.workloads.base import Blocks, Plan
from labkit.workloads.models.gpt import ShardFunction
from labkit.workloads.models.stream import in_stream_dtype


class DecoderEmbedding(nn.Module):
    """Tokens [N, T] to [N, T, width]."""

    tp_plan: ClassVar[Plan] = (("token", "vocabulary"),)
    cp_plan: ClassVar[Plan] = (("shard_sequence", "own_part"),)

    def __init__(self, token: nn.Embedding) -> None:
        super().__init__()
        self.token = token
        self.shard_sequence: ShardFunction = lambda x, dim: x
        """Returns this rank's part of the sequence; set by context parallelism."""

    def forward(self, tokens: Tensor) -> Tensor:
        return in_stream_dtype(self.token(self.shard_sequence(tokens, 1)))


class DecoderLayer(nn.Module):
    """One layer of the library with the rotary positions of the local tokens: [N, T, width] to the same.

    `tp_plan` is the library's own tensor-parallel plan of the layer: name of a module to a parallel style.
    """

    cp_plan: ClassVar[Plan] = (("positions", "own_positions"), ("layer.self_attn", "ring_of_transformers"))

    def __init__(self, layer: nn.Module, rotary: nn.Module, tp_plan: dict[str, str]) -> None:
        super().__init__()
        self.layer, self.rotary = layer, rotary
        parents = sorted({name.rpartition(".")[0] for name, style in tp_plan.items() if style == "colwise"})
        self.tp_plan: Plan = (
            *((f"layer.{name}", style) for name, style in tp_plan.items()),
            *((f"layer.{name}", "enter") for name in parents),
        )
        self.positions: Callable[[Tensor], Tensor] = lambda x: torch.arange(x.shape[1], device=x.device)

    def forward(self, x: Tensor) -> Tensor:
        positions = self.positions(x).unsqueeze(0)
        result: Any = self.layer(
            x,
            attention_mask=None,  # causal: the attention is causal by itself if there is no mask
            position_ids=positions,
            position_embeddings=self.rotary(x, positions),
            use_cache=False,
        )
        out: Tensor = result[0] if isinstance(result, tuple) else result
        return out


class DecoderHead(nn.Module):
    """Normalise and compute logits: [N, T, width] to [N, T, vocabulary]."""

    tp_plan: ClassVar[Plan] = (("score", "colwise"), ("score", "enter"))

    def __init__(self, norm: nn.Module, score: nn.Linear) -> None:
        super().__init__()
        self.norm, self.score = norm, score

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.score(self.norm(x))
        return logits


def chain(model: Any) -> Blocks:
    """Return blocks `embed`, `layer_0` …, `head` of a causal model: tokens [N, T] to logits [N, T, vocabulary]."""
    inner = model.model
    prefix = "layers.*."
    base_plan = model.config.base_model_tp_plan or {}
    tp_plan = {name.removeprefix(prefix): style for name, style in base_plan.items() if name.startswith(prefix)}
    blocks: dict[str, nn.Module] = {"embed": DecoderEmbedding(inner.embed_tokens)}
    for number, layer in enumerate(inner.layers):
        blocks[f"layer_{number}"] = DecoderLayer(layer, inner.rotary_emb, tp_plan)
    blocks["head"] = DecoderHead(inner.norm, model.lm_head)
    return Blocks(blocks)
