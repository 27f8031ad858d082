"""A GPT: a chain of pre-norm transformer layers with causal attention (Radford et al. 2019; Vaswani et al. 2017).

Learned positions, GELU, untied output: the smallest form that every notebook can print in full. With `experts` each
MLP becomes a mixture of experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from labkit.workloads.base import Blocks
from labkit.workloads.models.experts import MixtureOfExperts
from labkit.workloads.models.transformer import MLP, Attention, Layer


class TokenEmbedding(nn.Module):
    """A vector for each token plus one for its position: [N, T] int64 to [N, T, width], T at most `context`."""

    def __init__(self, vocabulary: int, context: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.cut_positions = (0, 1)
        """Which part of the sequence this rank goes on with, of how many (sequence parallelism cuts it here)."""

    def forward(self, tokens: Tensor) -> Tensor:
        index, parts = self.cut_positions
        out: Tensor = self.token(tokens) + self.position.weight[: tokens.shape[1]].chunk(parts)[index]
        return out


class TokenHead(nn.Module):
    """Normalise and score every token of the vocabulary: [N, T, width] to [N, T, vocabulary]."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.score = nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.score(self.norm(x))
        return logits


def gpt(
    vocabulary: int, context: int, width: int, depth: int, heads: int, experts: int = 0, experts_per_token: int = 2
) -> Blocks:
    """Blocks `embed`, `layer_0` … `layer_<depth-1>`, `head`: tokens [N, T] to logits [N, T, vocabulary]."""
    blocks: dict[str, nn.Module] = {"embed": TokenEmbedding(vocabulary, context, width)}
    for index in range(depth):
        mlp = MixtureOfExperts(width, experts, experts_per_token) if experts else MLP(width)
        blocks[f"layer_{index}"] = Layer(width, Attention(width, heads, causal=True), mlp)
    blocks["head"] = TokenHead(width, vocabulary)
    model = Blocks(blocks)
    model.apply(_initialise)
    with torch.no_grad():  # what a layer adds to the stream starts small, so that depth does not enlarge the stream
        for name, parameter in model.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                parameter.mul_((2 * depth) ** -0.5)
    return model


def _initialise(module: nn.Module) -> None:
    """Weights as wide as keeps the size of a signal (1/√inputs), embeddings half as wide as a normalised signal.

    GPT-2's fixed 0.02 is made for widths of a thousand; a network of a hundred takes twice as long to start from it.
    """
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.5)
