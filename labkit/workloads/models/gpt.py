"""A GPT: a chain of pre-norm transformer layers with causal attention (Radford et al. 2019; Vaswani et al. 2017).

It has learned positions and GELU: the smallest form that every notebook can print in full. With `experts` each MLP
becomes a mixture of experts; with `tied` the output layer is the token embedding (Press & Wolf 2017, arXiv:1608.05859);
with `mlp_growth` the MLPs widen from layer to layer (as in OpenELM, arXiv:2404.14619), so that layers cost unequal
time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from labkit.workloads.base import Blocks, Plan
from labkit.workloads.models.experts import MixtureOfExperts
from labkit.workloads.models.stream import in_stream_dtype
from labkit.workloads.models.transformer import MLP, Attention, Layer

ShardFunction = Callable[[Tensor, int], Tensor]
"""Function from (tensor, dimension of the sequence) to this rank's part of it."""


class TokenEmbedding(nn.Module):
    """A vector for each token plus one for its position: [N, T] int64 to [N, T, width], T at most `context`."""

    tp_plan: ClassVar[Plan] = (
        *(("token", "vocabulary"), ("position", "sequence_parallel")),
        ("shard_positions", "own_positions"),
    )
    cp_plan: ClassVar[Plan] = (("shard_sequence", "own_part"),)

    def __init__(self, vocabulary: int, context: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.shard_sequence: ShardFunction = lambda x, dim: x
        """Returns this rank's part of the sequence; set by context parallelism."""
        self.shard_positions: ShardFunction = lambda x, dim: x
        """Returns the part of that on which this rank continues; set by sequence parallelism."""

    def forward(self, tokens: Tensor) -> Tensor:
        positions = self.shard_positions(self.shard_sequence(self.position.weight[: tokens.shape[1]], 0), 0)
        return in_stream_dtype(self.token(self.shard_sequence(tokens, 1)) + positions)


class TokenHead(nn.Module):
    """Normalise and compute the logits of the vocabulary: [N, T, width] to [N, T, vocabulary]."""

    tp_plan: ClassVar[Plan] = (("score", "colwise"), ("score", "enter"), ("norm", "sequence_parallel"))

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.score = nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.score(self.norm(x))
        return logits


def gpt(
    vocabulary: int,
    context: int,
    width: int,
    depth: int,
    heads: int,
    experts: int = 0,
    experts_per_token: int = 2,
    capacity: float = 0.0,
    balance_loss: float = 0.0,
    mlp_growth: float = 1.0,
    tied: bool = False,
) -> Blocks:
    """Return blocks `embed`, `layer_0` … `layer_<depth-1>`, `head`: tokens [N, T] to logits [N, T, vocabulary]."""
    embedding, head = TokenEmbedding(vocabulary, context, width), TokenHead(width, vocabulary)
    blocks: dict[str, nn.Module] = {"embed": embedding}
    for index, hidden in enumerate(mlp_widths(width, depth, mlp_growth)):
        mlp: nn.Module = MLP(width, hidden)
        if experts:
            mlp = MixtureOfExperts(width, experts, experts_per_token, capacity, balance_loss)
        blocks[f"layer_{index}"] = Layer(width, Attention(width, heads, causal=True), mlp)
    blocks["head"] = head
    model = Blocks(blocks)
    model.apply(_initialise)
    if tied:
        head.score.weight = embedding.token.weight
        nn.init.normal_(embedding.token.weight, std=width**-0.5)  # the scale of the logits takes precedence
    with torch.no_grad():  # layers start with small additions to the residual stream, so that depth does not enlarge it
        for name, parameter in model.named_parameters():
            if name.endswith(("out.weight", "down.weight", "experts.down")):
                parameter.mul_((2 * depth) ** -0.5)
    return model


def mlp_widths(width: int, depth: int, growth: float) -> list[int]:
    """Return the inner widths of the MLPs, multiples of 8.

    They are 4·width on average; the last is `growth` times the first, with equal steps between.
    """
    steps = [1 + (growth - 1) * index / max(1, depth - 1) for index in range(depth)]
    return [max(8, 8 * round(4 * width * step / (sum(steps) / depth) / 8)) for step in steps]


def _initialise(module: nn.Module) -> None:
    """Initialise weights with std 1/√inputs, which keeps the scale of a signal, and embeddings with std 0.5.

    GPT-2's fixed 0.02 is made for widths of a thousand; a network with a width of a hundred takes twice as long to
    train from it.
    """
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.5)
