"""Tensor parallelism: single layers are sharded over ranks (Shoeybi et al. 2019, arXiv:1909.08053).

A pair of layers is sharded so that nothing is sent between the two: the first is column-parallel (each rank computes
some of the outputs), the second row-parallel (each rank adds up over some of the inputs), and one sum over the ranks
completes the pair. In attention the pair is (query, key, value) and the output layer, and the outputs of a rank are
whole heads. The embedding is sharded along the vocabulary.

With `sequence_parallel` the activations between the pairs are sharded along the sequence, so norms and residual sums
are computed once instead of on every rank (Korthikanti et al. 2022, arXiv:2205.05198). Replicated parameters there see
only a part of the tokens: their gradient is marked as partial along `tp`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from labkit.parallel import collectives
from labkit.parallel.cut import add_partial, shard_parameter
from labkit.parallel.mesh import Mesh

SEQUENCE = 1
"""Dimension of the sequence in activations [N, T, width]."""


class RowParallelLinear(nn.Module):
    """A linear layer or convolution sharded along its inputs; the results are summed over the ranks."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, mesh: Mesh, sequence: bool) -> None:
        super().__init__()
        group = mesh.group("tp")
        assert group is not None
        self.weight = shard_parameter(layer.weight, mesh, "tp", 1)
        self.bias = layer.bias
        self.arithmetic: Callable[[Tensor, Tensor], Tensor] = getattr(layer, "arithmetic", nn.functional.linear)
        if isinstance(layer, nn.Conv2d):
            stride, padding = layer.stride, layer.padding
            self.arithmetic = lambda x, weight: nn.functional.conv2d(x, weight, None, stride, padding)
        self._group, self._sequence = group, sequence
        if sequence and self.bias is not None:
            add_partial(self.bias, "tp")

    def forward(self, x: Tensor) -> Tensor:
        partial = self.arithmetic(x, self.weight)
        if self._sequence:
            total = collectives.reduce_scatter_to_sequence_region(partial, self._group, SEQUENCE)
        else:
            total = collectives.reduce_from_region(partial, self._group)
        # The bias is added once, after the sum.
        return total if self.bias is None else total + self.bias


class VocabParallelEmbedding(nn.Module):
    """An embedding sharded along the vocabulary; for tokens of other ranks this rank contributes zeros to the sum."""

    def __init__(self, embedding: nn.Embedding, mesh: Mesh, sequence: bool) -> None:
        super().__init__()
        group = mesh.group("tp")
        assert group is not None
        self.weight = shard_parameter(embedding.weight, mesh, "tp", 0)
        self._first = mesh.index("tp") * len(self.weight)
        self._group, self._sequence = group, sequence

    def forward(self, tokens: Tensor) -> Tensor:
        local = tokens - self._first
        is_local = (local >= 0) & (local < len(self.weight))
        partial = nn.functional.embedding(local.where(is_local, 0), self.weight) * is_local.unsqueeze(-1)
        if self._sequence:
            return collectives.reduce_scatter_to_sequence_region(partial, self._group, SEQUENCE)
        return collectives.reduce_from_region(partial, self._group)


def column_parallel(layer: nn.Linear | nn.Conv2d, mesh: Mesh) -> None:
    """Make the layer column-parallel in place: keep only this rank's outputs."""
    layer.weight = shard_parameter(layer.weight, mesh, "tp", 0)
    if layer.bias is not None:
        layer.bias = shard_parameter(layer.bias, mesh, "tp", 0)


def enter_region_at_input(module: nn.Module, mesh: Mesh, sequence: bool, name: str = "") -> None:
    """Register a hook by which an input of `module` enters the tensor-parallel region.

    It is the first positional input, or the keyword argument `name` if there is none. With `sequence` the input is
    all-gathered along the sequence.
    """
    group = mesh.group("tp")
    assert group is not None

    def enter(x: Tensor) -> Tensor:
        return (
            collectives.gather_from_sequence_region(x, group, SEQUENCE)
            if sequence
            else collectives.copy_to_region(x, group)
        )

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (enter(args[0]), *args[1:]), kwargs
        return args, kwargs | {name: enter(kwargs[name])}

    module.register_forward_pre_hook(hook, with_kwargs=True)


def apply(module: nn.Module, mesh: Mesh, sequence: bool) -> None:
    """Shard every layer of `module` that has a plan, in place."""
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
                column_parallel(layer, mesh)
            part.out = RowParallelLinear(part.out, mesh, sequence)  # type: ignore[assignment]
            enter_region_at_input(part, mesh, sequence)
        elif isinstance(part, MLP):
            column_parallel(part.up, mesh)
            part.down = RowParallelLinear(part.down, mesh, sequence)  # type: ignore[assignment]
            enter_region_at_input(part, mesh, sequence)
        elif isinstance(part, Layer) and sequence:
            for norm in (part.attention_norm, part.mlp_norm):
                for parameter in norm.parameters():
                    add_partial(parameter, "tp")
        elif isinstance(part, TokenEmbedding):
            part.token = VocabParallelEmbedding(part.token, mesh, sequence)  # type: ignore[assignment]
            if sequence:
                add_partial(part.position.weight, "tp")
                part.shard_positions = lambda x, dim: x.chunk(mesh.size("tp"), dim)[mesh.index("tp")]
        elif isinstance(part, TokenHead):
            column_parallel(part.score, mesh)
            enter_region_at_input(part.score, mesh, sequence)  # the logits stay sharded: labkit.parallel.loss
            if sequence:
                for parameter in part.norm.parameters():
                    add_partial(parameter, "tp")
        elif isinstance(part, PatchEmbedding) and sequence:
            part.register_forward_hook(lambda m, i, out: collectives.split(out, group, SEQUENCE))
        elif isinstance(part, MeanHead) and sequence:
            # Before a hook of context parallelism, which sharded the sequence first.
            part.register_forward_pre_hook(lambda m, i: (collectives.all_gather(i[0], group, SEQUENCE),), prepend=True)
        elif isinstance(part, Experts):
            part.up, part.down = shard_parameter(part.up, mesh, "tp", 1), shard_parameter(part.down, mesh, "tp", 2)
            enter_region_at_input(part, mesh, False)
            part.register_forward_hook(lambda m, i, out: collectives.reduce_from_region(out, group))
        elif isinstance(part, MixtureOfExperts) and sequence:
            # Every rank routes all tokens: otherwise the router would see other shares of an expert's queue.
            part.register_forward_pre_hook(lambda m, i: (collectives.all_gather(i[0], group, SEQUENCE),))
            part.register_forward_hook(lambda m, i, out: collectives.split(out, group, SEQUENCE))
        elif isinstance(part, DecoderEmbedding):
            part.token = VocabParallelEmbedding(part.token, mesh, False)  # type: ignore[assignment]
        elif isinstance(part, DecoderLayer):
            _by_plan(part.layer, part.tp_plan, mesh)
        elif isinstance(part, DecoderHead):
            column_parallel(part.score, mesh)
            enter_region_at_input(part.score, mesh, False)
        elif isinstance(part, ResidualBlock):
            _residual_block(part, mesh)
        elif isinstance(part, Surroundings):
            column_parallel(part.each[0], mesh)  # type: ignore[arg-type]
            part.each[2] = RowParallelLinear(part.each[2], mesh, False)  # type: ignore[arg-type]
            enter_region_at_input(part.each, mesh, False)


def _residual_block(block: nn.Module, mesh: Mesh) -> None:
    """Shard a residual block: column-parallel convolution, group norm by whole groups, row-parallel convolution."""
    convs: Any = block.convs
    first, norm, _, second, _ = convs
    size = mesh.size("tp")
    assert norm.num_groups % size == 0, "refused by a rule"
    column_parallel(first, mesh)
    norm.weight, norm.bias = shard_parameter(norm.weight, mesh, "tp", 0), shard_parameter(norm.bias, mesh, "tp", 0)
    norm.num_groups, norm.num_channels = norm.num_groups // size, norm.num_channels // size
    convs[3] = RowParallelLinear(second, mesh, False)
    enter_region_at_input(convs, mesh, False)


def _by_plan(layer: nn.Module, plan: dict[str, str], mesh: Mesh) -> None:
    """Shard a layer of transformers as its own `plan` says; ValueError for a style that labkit does not know."""
    parents: set[str] = set()
    for name, style in plan.items():
        parent, _, attribute = name.rpartition(".")
        part = layer.get_submodule(name)
        if style == "colwise":
            assert isinstance(part, nn.Linear)
            column_parallel(part, mesh)
            parents.add(parent)
        elif style == "rowwise":
            assert isinstance(part, nn.Linear)
            setattr(layer.get_submodule(parent), attribute, RowParallelLinear(part, mesh, False))
        elif style == "replicated_with_grad_allreduce":  # e.g. a norm of single heads, of which each rank has some
            for parameter in part.parameters():
                add_partial(parameter, "tp")
        else:
            raise ValueError(f"labkit does not know how to shard {name} {style}, as its plan in transformers asks")
    for parent in sorted(parents):
        enter_region_at_input(layer.get_submodule(parent), mesh, False, "hidden_states")
