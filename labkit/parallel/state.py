"""The full state of a sharded model by parameter name, and back: this makes checkpoints independent of the layout.

All ranks gather together; the rank with index 0 along every axis but pp keeps the result for its stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from labkit.parallel.collectives import all_gather_no_grad
from labkit.parallel.cut import ShardSpec
from labkit.parallel.mesh import Mesh
from labkit.parallel.shard import to_local
from labkit.parallel.sync import Zero1Bucket
from labkit.workloads.mapped import LARGE_MODEL, LARGE_TENSOR, MappedFiles

State = dict[str, Tensor]


class ShardedModel(Protocol):
    """The part of a model that a rank holds: `ParallelModel`, or `ReplicatedModel` with everything whole."""

    @property
    def stages(self) -> Mapping[int, nn.Module]: ...

    @property
    def shard_specs(self) -> Mapping[str, ShardSpec]:
        """Shard spec by parameter name; a parameter without one is whole."""
        ...

    @property
    def sharded(self) -> Sequence[Zero1Bucket]:
        """Buckets of which each rank updates a shard (ZeRO stages 1 and 2)."""
        ...

    @property
    def mesh(self) -> Mesh: ...


def gather(
    model: ShardedModel, optimizer: torch.optim.Optimizer, own: bool = False, files: MappedFiles | None = None
) -> tuple[State, State]:
    """Gather full weights and buffers by name, and the optimizer state by `state.NAME.KEY`, on the CPU (collective).

    They are those of this rank's stages. Both are empty on ranks whose stages another rank saves, unless a rank asks
    for its `own` state: under some update rules every rank has a different one. Large states are kept in
    `files`, if they are given.
    """
    keeps = own or model.mesh.rank == model.mesh.writer
    weights, moments = State(), State()
    total = 0

    def keep(state: State, key: str, name: str, value: Tensor) -> None:
        nonlocal total
        value = full_tensor(value, _shard_spec(model, name), model.mesh) if value.dim() else value
        if keeps:
            value = _as_stored(value.detach().cpu())
            total += value.nbytes
            if files is not None and total > LARGE_MODEL and value.nbytes >= LARGE_TENSOR:
                state[key] = files.copy_if_possible(value)
            else:
                state[key] = value.clone(memory_format=torch.contiguous_format)

    for name, parameter in parameters_of(model):
        if not _shard_spec(model, name).copy:
            keep(weights, name, name, parameter)
    for name, buffer in _buffers(model):
        keep(weights, name, name, buffer)
    for name, key, value in _optimizer_state(model, optimizer):
        if _shard_spec(model, name).copy:
            continue
        keep(moments, f"state.{name}.{key}", name, value)
    return weights, moments


@torch.no_grad()
def restore(model: ShardedModel, optimizer: torch.optim.Optimizer, weights: State, moments: State) -> None:
    """Set this rank's shards and optimizer state from the full state; KeyError or ValueError if it does not fit."""
    expected = {name for name, _ in (*parameters_of(model), *_buffers(model))}
    if model.mesh.size("pp") == 1 and set(weights) != expected:
        raise ValueError(f"it holds {', '.join(sorted(set(weights) ^ expected)[:3])} or lacks it")
    for name, parameter in parameters_of(model):
        weight = _from_stored(weights[_saved_name(model, name)], parameter)
        _copy_checked(local_shard(weight, model, name, like=parameter), to_local(parameter))
    for name, buffer in _buffers(model):
        _copy_checked(_from_stored(weights[name], buffer), buffer)
    if not moments:  # an optimizer without state (SGD without momentum) has nothing to restore
        return
    by_name: dict[str, State] = {}
    for path, value in moments.items():
        name, _, key = path.removeprefix("state.").rpartition(".")
        by_name.setdefault(name, {})[key] = value
    if model.sharded:
        for piece in (piece for bucket in model.sharded for piece in bucket.pieces if piece.name):
            for key, value in by_name.get(_saved_name(model, piece.name), {}).items():
                value = _from_stored(value, piece.shard)
                if value.dim():
                    value = piece.select(local_shard(value, model, piece.name))
                optimizer.state[piece.shard][key] = value.to(piece.shard.device, copy=True)
        # The padding of a bucket has moments of zero; compressors read the moments of all pieces.
        sample = next(iter(by_name.values()))
        for pad in (piece.shard for bucket in model.sharded for piece in bucket.pieces if not piece.name):
            for key, value in sample.items():
                filled = pad.new_zeros(pad.shape, dtype=value.dtype) if value.dim() else value.to(pad.device, copy=True)
                optimizer.state[pad][key] = filled
        return
    for name, parameter in parameters_of(model):
        # An optimizer has no state for a parameter that never had a gradient.
        for key, value in by_name.get(_saved_name(model, name), {}).items() if parameter.requires_grad else ():
            value = _from_stored(value, parameter)
            if value.dim():
                value = local_shard(value, model, name, like=parameter)
            value = value.to(parameter.device, copy=True)
            if value.dim() and isinstance(parameter, DTensor):
                value = DTensor.from_local(
                    value,
                    parameter.device_mesh,
                    parameter.placements,
                    run_check=False,
                    shape=parameter.shape,
                    stride=parameter.stride(),
                )
            optimizer.state[parameter][key] = value


def parameters_of(model: ShardedModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, parameter) of this rank's stages, each parameter once: a tied one under its first name."""
    for module in model.stages.values():
        yield from module.named_parameters()


def _buffers(model: ShardedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, buffer) of the buffers that belong to the state (running means, not caches)."""
    for module in model.stages.values():
        parameters = dict(module.named_parameters(remove_duplicate=False))
        for name, value in module.state_dict(keep_vars=True).items():
            if name not in parameters:
                yield name, value


def _optimizer_state(model: ShardedModel, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (name of the parameter, key, value), all-gathered along dp_shard where ZeRO shards it."""
    if model.sharded:
        for bucket in model.sharded:
            yield from bucket.optimizer_state(lambda shard: _state_of(optimizer, shard))
        return
    for name, parameter in parameters_of(model):
        for key, value in _state_of(optimizer, parameter).items():
            if value is not None:  # SGD without momentum
                yield name, key, value


def _state_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """Return the optimizer state of a parameter; packed state is unpacked, so that it can be split and joined."""
    unpacked: Any = getattr(optimizer, "unpacked", None)
    return optimizer.state.get(parameter, {}) if unpacked is None else unpacked(parameter)


def _shard_spec(model: ShardedModel, name: str) -> ShardSpec:
    return model.shard_specs.get(name, ShardSpec())


def _saved_name(model: ShardedModel, name: str) -> str:
    """Return the name under which a parameter is saved: for a copy of a tied weight that of the first."""
    return _shard_spec(model, name).tied or name


def full_tensor(shard: Tensor, spec: ShardSpec, mesh: Mesh) -> Tensor:
    """All-gather the full tensor from this rank's shard (collective)."""
    tensor = (_all_gather_rows(shard) if isinstance(shard, DTensor) else shard).detach()
    if spec.pattern is not None:
        return spec.pattern.to_dense(tensor)
    for axis, dim in reversed(spec.shard_dims.items()):
        group = mesh.group(axis)
        assert group is not None
        tensor = all_gather_no_grad(tensor, group, dim)
    return tensor


def _all_gather_rows(tensor: DTensor) -> Tensor:
    """Return the full tensor from the rows that `fully_shard` gives each rank (collective).

    It uses an ordinary collective: the functional one behind `full_tensor()` crashes (SIGSEGV) on a GPU that ranks
    share over gloo (seen with torch 2.11 on an H200).
    """
    part = tensor.to_local().detach()
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            assert placement.dim == 0, "fully_shard cuts along the first dimension"
            group = tensor.device_mesh.get_group(axis)
            padded = part.new_zeros((-(-tensor.shape[0] // group.size()), *tensor.shape[1:]))
            padded[: len(part)] = part
            part = all_gather_no_grad(padded, group, 0)[: tensor.shape[0]]
    return part


def local_shard(tensor: Tensor, model: ShardedModel, name: str, like: Tensor | None = None) -> Tensor:
    """Return this rank's shard of a full tensor; if sharded `like` a DTensor, the rows that `fully_shard` gives it."""
    mesh, spec = model.mesh, _shard_spec(model, name)
    if spec.pattern is not None:
        return spec.pattern.from_dense(tensor)
    for axis, dim in spec.shard_dims.items():
        tensor = tensor.chunk(mesh.size(axis), dim)[mesh.index(axis)]
    if isinstance(like, DTensor):
        rows, index = tensor.chunk(mesh.size("dp_shard"), 0), mesh.index("dp_shard")
        tensor = rows[index] if index < len(rows) else tensor[:0]
    return tensor


def _as_stored(tensor: Tensor) -> Tensor:
    """Return the tensor as safetensors can store it: complex128 as pairs of real numbers, as it has only complex64."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.dtype == torch.complex128 else tensor


def _from_stored(stored: Tensor, like: Tensor) -> Tensor:
    """Undo `_as_stored` for a parameter or buffer `like` this one; scalars stay as they are."""
    paired = like.is_complex() and not stored.is_complex() and stored.dim()
    return torch.view_as_complex(stored.contiguous()) if paired else stored


def _copy_checked(source: Tensor, target: Tensor) -> None:
    if source.shape != target.shape:  # copy_ would broadcast
        raise ValueError(f"a tensor of shape {list(source.shape)} was saved where {list(target.shape)} is needed")
    target.copy_(source)
