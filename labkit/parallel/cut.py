"""What a rank holds of a parameter: a `ShardSpec` on the parameter itself, written while a layout is applied.

`shard_dims`: the mesh axes along which the parameter is sharded, and the sharded dimension for each.
`tied`: see labkit.parallel.tie.
`pattern`: the parameter holds only some elements of a matrix.
`partial`: axes along which every rank computes only a part of the gradient although all hold the same values; the parts
are added up after the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from labkit.parallel.mesh import Mesh


class Pattern(Protocol):
    """The places of a sparse matrix to which a vector of values belongs (labkit.sparsity.csr)."""

    def to_dense(self, values: Tensor) -> Tensor: ...

    def from_dense(self, dense: Tensor) -> Tensor: ...

    def set(self, mask: Tensor) -> None: ...


@dataclass(frozen=True)
class ShardSpec:
    """How one parameter is laid out on the mesh."""

    shard_dims: dict[str, int] = field(default_factory=dict)
    """Mesh axis to the tensor dimension that is sharded along it."""
    partial: frozenset[str] = frozenset()
    """Mesh axes along which the gradient still has to be added up."""
    tied: str | None = None
    """Name of the weight if several stages of a pipeline hold it; each of them has a copy of its own."""
    copy: bool = False
    """True for every copy of a tied weight but the first."""
    pattern: Pattern | None = None
    """Sparsity pattern, if the parameter holds only the values that a sparse matrix keeps."""


def shard_spec_of(parameter: Tensor) -> ShardSpec:
    """Return the parameter's shard spec; without one the parameter is whole on every rank."""
    spec: ShardSpec = getattr(parameter, "labkit_shard_spec", None) or ShardSpec()
    return spec


def annotate(parameter: Tensor, **changes: object) -> None:
    """Change fields of the parameter's shard spec."""
    parameter.labkit_shard_spec = replace(shard_spec_of(parameter), **changes)  # type: ignore[attr-defined, arg-type]


def shard_parameter(parameter: Tensor, mesh: Mesh, axis: str, dim: int) -> nn.Parameter:
    """Return this rank's shard of the parameter, sharded along dimension `dim` over `axis` of the mesh.

    Raises ValueError if the ranks along `axis` do not divide the dimension evenly.
    """
    count, index = mesh.size(axis), mesh.index(axis)
    existing: nn.Parameter | None = getattr(parameter, "labkit_shard", None)
    if existing is not None:  # a weight used in two places is sharded once, and stays one weight
        assert shard_spec_of(existing).shard_dims == {**shard_spec_of(parameter).shard_dims, axis: dim}
        return existing
    if parameter.shape[dim] % count:  # in models that no rule knows before the ranks have built them
        raise ValueError(f"{count} ranks along {axis} do not divide a weight of {list(parameter.shape)} evenly")
    shard = nn.Parameter(
        parameter.detach().chunk(count, dim)[index].clone(memory_format=torch.contiguous_format),
        requires_grad=parameter.requires_grad,
    )
    spec = shard_spec_of(parameter)
    shard.labkit_shard_spec = replace(spec, shard_dims={**spec.shard_dims, axis: dim})  # type: ignore[attr-defined]
    parameter.labkit_shard = shard  # type: ignore[attr-defined]
    return shard


def add_partial(parameter: Tensor, axis: str) -> None:
    """Record in the shard spec that the gradient of the parameter has to be added up along `axis`."""
    annotate(parameter, partial=shard_spec_of(parameter).partial | {axis})
