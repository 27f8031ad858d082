"""Tensor parallelism: single layers are cut over ranks (Shoeybi et al. 2019, arXiv:1909.08053).

A pair of layers is cut so that nothing travels between the two: the first by columns (each rank computes some of the
outputs), the second by rows (each rank adds up over some of the inputs), and one sum over the ranks completes the pair.
In an attention the pair are query, key, value and the output layer, and the outputs of a rank are whole heads. The
embedding is cut along the vocabulary.

With `sequence_parallel` the activations between the pairs are cut along the sequence, so norms and residual sums are
computed once instead of on every rank (Korthikanti et al. 2022, arXiv:2205.05198). What is replicated there sees a part
of the tokens only: its gradient is noted as partial along `tp`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from labkit.parallel import collectives
from labkit.parallel.cut import add_partial, cut
from labkit.parallel.mesh import Mesh

SEQUENCE = 1
"""Dimension of the sequence in activations [N, T, width]."""


class RowParallelLinear(nn.Module):
    """A linear layer or convolution of which this rank holds some inputs; the results are summed over the ranks."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, mesh: Mesh, sequence: bool) -> None:
        super().__init__()
        group = mesh.group("tp")
        assert group is not None
        self.weight = cut(layer.weight, mesh, "tp", 1)
        self.bias = layer.bias
        self.arithmetic: Callable[[Tensor, Tensor], Tensor] = getattr(layer, "arithmetic", nn.functional.linear)
        if isinstance(layer, nn.Conv2d):
            stride, padding = layer.stride, layer.padding
            self.arithmetic = lambda x, weight: nn.functional.conv2d(x, weight, None, stride, padding)
        self._group, self._sequence = group, sequence
        if sequence and self.bias is not None:
            add_partial(self.bias, "tp")

    def forward(self, x: Tensor) -> Tensor:
        part = self.arithmetic(x, self.weight)
        if self._sequence:
            whole = collectives.reduce_scatter_to_sequence_region(part, self._group, SEQUENCE)
        else:
            whole = collectives.reduce_from_region(part, self._group)
        # Once, after the sum.
        return whole if self.bias is None else whole + self.bias


class VocabParallelEmbedding(nn.Module):
    """An embedding of which this rank holds some rows; the others contribute zeros."""

    def __init__(self, embedding: nn.Embedding, mesh: Mesh, sequence: bool) -> None:
        super().__init__()
        group = mesh.group("tp")
        assert group is not None
        self.weight = cut(embedding.weight, mesh, "tp", 0)
        self._first = mesh.index("tp") * len(self.weight)
        self._group, self._sequence = group, sequence

    def forward(self, tokens: Tensor) -> Tensor:
        local = tokens - self._first
        mine = (local >= 0) & (local < len(self.weight))
        part = nn.functional.embedding(local.where(mine, 0), self.weight) * mine.unsqueeze(-1)
        if self._sequence:
            return collectives.reduce_scatter_to_sequence_region(part, self._group, SEQUENCE)
        return collectives.reduce_from_region(part, self._group)


def columns(layer: nn.Linear | nn.Conv2d, mesh: Mesh) -> None:
    """Keep this rank's outputs of the layer, in place."""
    layer.weight = cut(layer.weight, mesh, "tp", 0)
    if layer.bias is not None:
        layer.bias = cut(layer.bias, mesh, "tp", 0)


def entrance(module: nn.Module, mesh: Mesh, sequence: bool, name: str = "") -> None:
    """The first input of `module`, or the one called `name`, enters a region in which every rank computes a part."""
    group = mesh.group("tp")
    assert group is not None

    def enter(x: Tensor) -> Tensor:
        return (
            collectives.gather_from_sequence_region(x, group, SEQUENCE)
            if sequence
            else collectives.copy_to_region(x, group)
        )

    def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        if inputs:
            return (enter(inputs[0]), *inputs[1:]), named
        return inputs, named | {name: enter(named[name])}

    module.register_forward_pre_hook(hook, with_kwargs=True)


def apply(module: nn.Module, mesh: Mesh, sequence: bool) -> None:
    """Cut every layer of `module` that has a plan, in place."""
    from labkit.workloads.models.decoder import DecoderEmbedding, DecoderHead, DecoderLayer
    from labkit.workloads.models.driver import Surroundings
    from labkit.workloads.models.experts import Experts, MixtureOfExperts
    from labkit.workloads.models.gpt import TokenEmbedding, TokenHead
    from labkit.workloads.models.resnet import ResidualBlock
    from labkit.workloads.models.transformer import MLP, Attention, Layer
    from labkit.workloads.models.vit import MeanHead, PatchEmbedding

    group = mesh.group("tp")
    assert group is not None
    for part in list(module.modules()):
        if isinstance(part, Attention):
            assert part.heads % mesh.size("tp") == 0, "refused by a rule"
            for layer in (part.query, part.key, part.value):
                columns(layer, mesh)
            part.out = RowParallelLinear(part.out, mesh, sequence)  # type: ignore[assignment]
            entrance(part, mesh, sequence)
        elif isinstance(part, MLP):
            columns(part.up, mesh)
            part.down = RowParallelLinear(part.down, mesh, sequence)  # type: ignore[assignment]
            entrance(part, mesh, sequence)
        elif isinstance(part, Layer) and sequence:
            for norm in (part.attention_norm, part.mlp_norm):
                for parameter in norm.parameters():
                    add_partial(parameter, "tp")
        elif isinstance(part, TokenEmbedding):
            part.token = VocabParallelEmbedding(part.token, mesh, sequence)  # type: ignore[assignment]
            if sequence:
                add_partial(part.position.weight, "tp")
                part.cut_positions = lambda x, dim: x.chunk(mesh.size("tp"), dim)[mesh.index("tp")]
        elif isinstance(part, TokenHead):
            columns(part.score, mesh)
            entrance(part.score, mesh, sequence)  # the scores stay cut: labkit.parallel.loss
            if sequence:
                for parameter in part.norm.parameters():
                    add_partial(parameter, "tp")
        elif isinstance(part, PatchEmbedding) and sequence:
            part.register_forward_hook(lambda m, i, out: collectives.split(out, group, SEQUENCE))
        elif isinstance(part, MeanHead) and sequence:
            # Before a hook of context parallelism, whose cut came first.
            part.register_forward_pre_hook(lambda m, i: (collectives.all_gather(i[0], group, SEQUENCE),), prepend=True)
        elif isinstance(part, Experts):
            part.up, part.down = cut(part.up, mesh, "tp", 1), cut(part.down, mesh, "tp", 2)
            entrance(part, mesh, False)
            part.register_forward_hook(lambda m, i, out: collectives.reduce_from_region(out, group))
        elif isinstance(part, MixtureOfExperts) and sequence:
            # Every rank routes all tokens: the router would see other shares of an expert's queue otherwise.
            part.register_forward_pre_hook(lambda m, i: (collectives.all_gather(i[0], group, SEQUENCE),))
            part.register_forward_hook(lambda m, i, out: collectives.split(out, group, SEQUENCE))
        elif isinstance(part, DecoderEmbedding):
            part.token = VocabParallelEmbedding(part.token, mesh, False)  # type: ignore[assignment]
        elif isinstance(part, DecoderLayer):
            _by_plan(part.layer, part.plan, mesh)
        elif isinstance(part, DecoderHead):
            columns(part.score, mesh)
            entrance(part.score, mesh, False)
        elif isinstance(part, ResidualBlock):
            _residual_block(part, mesh)
        elif isinstance(part, Surroundings):
            columns(part.each[0], mesh)  # type: ignore[arg-type]
            part.each[2] = RowParallelLinear(part.each[2], mesh, False)  # type: ignore[arg-type]
            entrance(part.each, mesh, False)


def _residual_block(block: nn.Module, mesh: Mesh) -> None:
    """Convolution by columns, group norm by whole groups, activation, convolution by rows."""
    convs: Any = block.convs
    first, norm, _, second, _ = convs
    size = mesh.size("tp")
    assert norm.num_groups % size == 0, "refused by a rule"
    columns(first, mesh)
    norm.weight, norm.bias = cut(norm.weight, mesh, "tp", 0), cut(norm.bias, mesh, "tp", 0)
    norm.num_groups, norm.num_channels = norm.num_groups // size, norm.num_channels // size
    convs[3] = RowParallelLinear(second, mesh, False)
    entrance(convs, mesh, False)


def _by_plan(layer: nn.Module, plan: dict[str, str], mesh: Mesh) -> None:
    """A layer of transformers, as its own plan says."""
    parents: set[str] = set()
    for name, style in plan.items():
        parent, _, last = name.rpartition(".")
        part = layer.get_submodule(name)
        if style == "colwise":
            assert isinstance(part, nn.Linear)
            columns(part, mesh)
            parents.add(parent)
        elif style == "rowwise":
            assert isinstance(part, nn.Linear)
            setattr(layer.get_submodule(parent), last, RowParallelLinear(part, mesh, False))
        elif style == "replicated_with_grad_allreduce":  # e.g. a norm of single heads, of which each rank has some
            for parameter in part.parameters():
                add_partial(parameter, "tp")
        else:
            raise ValueError(f"labkit does not know how to cut {name} {style}, as its plan in transformers asks for")
    for parent in sorted(parents):
        entrance(layer.get_submodule(parent), mesh, False, "hidden_states")
