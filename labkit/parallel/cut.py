"""What a rank holds of a parameter: notes that stand on the parameter itself while a layout is applied.

`cut`: the axis along whose ranks the parameter is cut, and the dimension that is cut.
`tied`: see labkit.parallel.tie.
`pattern`: the parameter holds some places of a matrix only.
`partial`: axes along which every rank has only a part of the gradient although it holds the same values; the parts are
added after the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from labkit.parallel.mesh import Mesh


class Pattern(Protocol):
    """Which places of a matrix a vector of values belongs to."""

    def spread(self, values: Tensor) -> Tensor: ...

    def taken(self, dense: Tensor) -> Tensor: ...

    def set(self, mask: Tensor) -> None: ...


@dataclass(frozen=True)
class ShardSpec:
    """How one parameter lies on the mesh."""

    cuts: dict[str, int] = field(default_factory=dict)
    """Axis to dimension."""
    partial: frozenset[str] = frozenset()
    tied: str | None = None
    """Name of a weight that several stages of a pipeline hold; each has a copy of its own."""
    copy: bool = False
    """One of the copies beyond the first."""
    pattern: Pattern | None = None
    """Of a sparse matrix, whose values alone are the parameter."""


def holding(parameter: Tensor) -> ShardSpec:
    """What is noted on the parameter; by default it is whole on every rank."""
    noted: ShardSpec = getattr(parameter, "labkit_holding", None) or ShardSpec()
    return noted


def note(parameter: Tensor, **changes: object) -> None:
    """Change what is noted on the parameter."""
    parameter.labkit_holding = replace(holding(parameter), **changes)  # type: ignore[attr-defined, arg-type]


def cut(parameter: Tensor, mesh: Mesh, axis: str, dim: int) -> nn.Parameter:
    """The part of the parameter that this rank holds, along `axis` of the mesh and dimension `dim`."""
    parts, index = mesh.size(axis), mesh.index(axis)
    done: nn.Parameter | None = getattr(parameter, "labkit_part", None)
    if done is not None:  # a weight that stands in two places is cut once, and stays one weight
        assert holding(done).cuts == {**holding(parameter).cuts, axis: dim}
        return done
    if parameter.shape[dim] % parts:  # of models that no rule knows before the ranks have built them
        raise ValueError(f"{parts} ranks along {axis} do not divide a weight of {list(parameter.shape)} evenly")
    part = nn.Parameter(
        parameter.detach().chunk(parts, dim)[index].clone(memory_format=torch.contiguous_format),
        requires_grad=parameter.requires_grad,
    )
    before = holding(parameter)
    part.labkit_holding = replace(before, cuts={**before.cuts, axis: dim})  # type: ignore[attr-defined]
    parameter.labkit_part = part  # type: ignore[attr-defined]
    return part


def add_partial(parameter: Tensor, axis: str) -> None:
    """Note that the gradient of the parameter has to be added along `axis`."""
    note(parameter, partial=holding(parameter).partial | {axis})
