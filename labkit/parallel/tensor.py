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
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from labkit.parallel import collectives
from labkit.parallel.cut import add_partial, shard_parameter
from labkit.parallel.mesh import Mesh
from labkit.parallel.plan import apply_plans
from labkit.workloads.models.stream import in_stream_dtype

SEQUENCE = 1
"""Dimension of the sequence in activations [N, T, width]."""
Style = Callable[["Place"], None]
"""Shards the part of a module at a place."""


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
        return total if self.bias is None else total + self.bias.to(total.dtype)


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
        partial = in_stream_dtype(partial)  # one rank's vector and zeros: their sum is exact in any format
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
        x = in_stream_dtype(x)  # as the products that follow would convert it: messages take half of the bytes
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
    """Shard every part of `module` that has a plan (`tp_plan`), in place; ValueError for a style that is not known."""

    def at(style: Style) -> Callable[[nn.Module, str], None]:
        return lambda owner, name: style(Place(owner, name, mesh, sequence))

    apply_plans(module, "tp_plan", {name: at(style) for name, style in STYLES.items()})


@dataclass(frozen=True)
class Place:
    """The part of a module that a style applies to."""

    owner: nn.Module
    name: str
    """Dotted name of a submodule or attribute of the owner; empty for the owner itself."""
    mesh: Mesh
    sequence: bool
    """Whether activations are sharded along the sequence."""

    @property
    def part(self) -> Any:
        """The submodule or attribute itself."""
        return attrgetter(self.name)(self.owner) if self.name else self.owner

    def replace(self, part: Any) -> None:
        """Put `part` in the place of the submodule or attribute."""
        parent, _, attribute = self.name.rpartition(".")
        setattr(self.owner.get_submodule(parent), attribute, part)

    @property
    def group(self) -> dist.ProcessGroup:
        """Process group of the tensor-parallel ranks."""
        group = self.mesh.group("tp")
        assert group is not None
        return group


def _group_norm(place: Place) -> None:
    """Keep this rank's whole groups of a group norm."""
    norm, size = place.part, place.mesh.size("tp")
    assert norm.num_groups % size == 0, "refused by a rule"
    norm.weight, norm.bias = (shard_parameter(value, place.mesh, "tp", 0) for value in (norm.weight, norm.bias))
    norm.num_groups, norm.num_channels = norm.num_groups // size, norm.num_channels // size


def _partial_gradients(place: Place) -> None:
    """Record that this rank computes only a part of the gradient of all parameters of the part."""
    for parameter in place.part.parameters():
        add_partial(parameter, "tp")


def _own_positions(place: Place) -> None:
    """Set a function that returns this rank's part of the positions."""
    size, index = place.mesh.size("tp"), place.mesh.index("tp")
    place.replace(lambda x, dim: x.chunk(size, dim)[index])


def _gather_input(place: Place) -> None:
    """All-gather the input along the sequence, before a hook of context parallelism, which sharded it first."""
    group = place.group
    place.part.register_forward_pre_hook(lambda m, i: (collectives.all_gather(i[0], group, SEQUENCE),), prepend=True)


def _shard_output(place: Place) -> None:
    """Keep this rank's part of the output along the sequence."""
    group = place.group
    place.part.register_forward_hook(lambda m, i, out: collectives.split(out, group, SEQUENCE))


def _reduce_output(place: Place) -> None:
    """Sum the output over the ranks."""
    group = place.group
    place.part.register_forward_hook(lambda m, i, out: collectives.reduce_from_region(out, group))


def _enter(place: Place) -> None:
    enter_region_at_input(place.part, place.mesh, place.sequence, "hidden_states")


def _dim(dim: int) -> Style:
    """Return the style that shards a parameter along a dimension."""
    return lambda place: place.replace(shard_parameter(place.part, place.mesh, "tp", dim))


def _if_sequence(style: Style) -> Style:
    """Return the style that does the same under sequence parallelism only."""
    return lambda place: style(place) if place.sequence else None


STYLES: dict[str, Style] = {
    "colwise": lambda place: column_parallel(place.part, place.mesh),
    "rowwise": lambda place: place.replace(RowParallelLinear(place.part, place.mesh, place.sequence)),
    "vocabulary": lambda place: place.replace(VocabParallelEmbedding(place.part, place.mesh, place.sequence)),
    "group_norm": _group_norm,
    "dim 1": _dim(1),
    "dim 2": _dim(2),
    "enter": _enter,
    "enter_whole": lambda place: enter_region_at_input(place.part, place.mesh, False),
    "reduce_output": _reduce_output,
    "replicated_with_grad_allreduce": _partial_gradients,
    "sequence_parallel": _if_sequence(_partial_gradients),
    "own_positions": _if_sequence(_own_positions),
    "shard_output": _if_sequence(_shard_output),
    "gather_input": _if_sequence(_gather_input),
}
"""What can be done with a part of a module, by the name that plans use. Those of transformers are among them.

`colwise`, `rowwise`, `vocabulary`, `group_norm`, `dim 1` and `dim 2` shard parameters. `enter` and `enter_whole` begin
the region in which activations differ between ranks; it ends in row-parallel layers, or with `reduce_output`, and all
that enters must leave that way: the gradient of an input is the sum over the ranks. The last five say which gradients
and activations are partial; but for `replicated_with_grad_allreduce` they apply under sequence parallelism only.
"""
