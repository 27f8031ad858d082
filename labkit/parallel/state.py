"""The whole state of a spread model, by parameter name, and back: what makes checkpoints independent of the layout.

All ranks gather together; the rank that stands first along every axis but pp keeps the result of its stages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from labkit.parallel.collectives import _gather
from labkit.parallel.cut import Holding
from labkit.parallel.mesh import Mesh

if TYPE_CHECKING:
    from labkit.parallel.model import ParallelModel


def whole(local: Tensor, holding: Holding, mesh: Mesh) -> Tensor:
    """The uncut tensor from this rank's part (collective)."""
    tensor = local.full_tensor() if isinstance(local, DTensor) else local
    tensor = tensor.detach()
    for axis, dim in reversed(list(holding.cuts.items())):
        group = mesh.group(axis)
        assert group is not None
        tensor = _gather(tensor, group, dim)
    return tensor


def part(tensor: Tensor, holding: Holding, mesh: Mesh) -> Tensor:
    """The part of an uncut tensor that this rank holds."""
    for axis, dim in holding.cuts.items():
        tensor = tensor.chunk(mesh.size(axis), dim)[mesh.index(axis)]
    return tensor


def shard_of(tensor: Tensor, like: DTensor, mesh: Mesh) -> Tensor:
    """The rows of `tensor` that `fully_shard` gives to this rank."""
    rows = tensor.chunk(mesh.size("dp_shard"), 0)
    index = mesh.index("dp_shard")
    return rows[index] if index < len(rows) else tensor[:0]


def read(model: ParallelModel, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights by name and optimizer state by `state.NAME.KEY`, whole, on the CPU, of the stages of this rank."""
    mesh, weights, moments = model.mesh, {}, {}
    keeps = mesh.rank == model.writer
    for name, parameter in model.named_parameters():
        tensor = whole(parameter, model.holdings[name], mesh)
        if keeps:
            weights[name] = tensor.cpu().clone()

    def keep(name: str, key: str, value: Tensor) -> None:
        if value.dim():
            value = whole(value, model.holdings[name], mesh)
        if keeps:
            moments[f"state.{name}.{key}"] = value.detach().cpu().clone()

    if model.sync is not None and model.sync.stage:
        for bucket in model.sync.buckets:
            assert bucket.own is not None
            for key, value in optimizer.state.get(bucket.own, {}).items():
                values = bucket.gathered(value) if value.dim() else dict.fromkeys(bucket.names, value)
                for name, one in values.items():
                    keep(name, key, one)
    else:
        for name, parameter in model.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                keep(name, key, value)
    return weights, moments


@torch.no_grad()
def write(
    model: ParallelModel,
    optimizer: torch.optim.Optimizer,
    weights: dict[str, Tensor],
    moments: dict[str, Tensor],
) -> None:
    """Set this rank's parts from the whole state; KeyError or RuntimeError if it does not fit."""
    mesh = model.mesh
    by_name: dict[str, dict[str, Tensor]] = {}
    for path, value in moments.items():
        name, _, key = path.removeprefix("state.").rpartition(".")
        by_name.setdefault(name, {})[key] = value
    for name, parameter in model.named_parameters():
        local = part(weights[name], model.holdings[name], mesh)
        if isinstance(parameter, DTensor):
            parameter.to_local().copy_(shard_of(local, parameter, mesh))
        else:
            parameter.copy_(local)
    if not moments:
        return
    if model.sync is not None and model.sync.stage:
        for bucket in model.sync.buckets:
            assert bucket.own is not None
            for key, value in by_name[bucket.names[0]].items():
                if value.dim():
                    parts = {name: part(by_name[name][key], bucket.holding, mesh) for name in bucket.names}
                    value = bucket.taken(parts)
                optimizer.state[bucket.own][key] = value.to(bucket.own.device, copy=True)
        return
    for name, parameter in model.named_parameters():
        for key, value in by_name[name].items():
            if value.dim():
                value = part(value, model.holdings[name], mesh)
                if isinstance(parameter, DTensor):
                    local = shard_of(value, parameter, mesh).to(parameter.device, copy=True)
                    value = DTensor.from_local(
                        local,
                        parameter.device_mesh,
                        parameter.placements,
                        run_check=False,
                        shape=parameter.shape,
                        stride=parameter.stride(),
                    )
            optimizer.state[parameter][key] = value.to(parameter.device, copy=not isinstance(value, DTensor))
