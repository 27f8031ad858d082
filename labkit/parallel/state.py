"""The whole state of a spread model, by parameter name, and back: what makes checkpoints independent of the layout.

All ranks gather together; the rank that stands first along every axis but pp keeps the result of its stages.
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
from labkit.parallel.shard import local
from labkit.parallel.sync import Zero1Bucket

State = dict[str, Tensor]


class Spread(Protocol):
    """A model as its rank holds it."""

    @property
    def stages(self) -> Mapping[int, nn.Module]: ...

    @property
    def holdings(self) -> Mapping[str, ShardSpec]:
        """How parameters lie on the mesh; one that is not named is whole."""
        ...

    @property
    def sharded(self) -> Sequence[Zero1Bucket]:
        """Buckets of which each rank optimizes a part (ZeRO stages 1 and 2)."""
        ...

    @property
    def mesh(self) -> Mesh: ...


def gather(model: Spread, optimizer: torch.optim.Optimizer, own: bool = False) -> tuple[State, State]:
    """Weights and buffers by name and optimizer state by `state.NAME.KEY` of this rank's stages, whole, on the CPU.

    Both are empty on ranks whose stages another rank keeps; unless a rank asks for its `own`, which under some update
    rules are others on each rank.
    """
    keeps = own or model.mesh.rank == model.mesh.writer
    weights, moments = State(), State()

    def keep(found: State, key: str, name: str, value: Tensor) -> None:
        value = whole_of(value, _holding(model, name), model.mesh) if value.dim() else value
        if keeps:
            found[key] = _as_stored(value.detach().cpu()).clone(memory_format=torch.contiguous_format)

    for name, parameter in parameters_of(model):
        if not _holding(model, name).copy:
            keep(weights, name, name, parameter)
    for name, buffer in _buffers(model):
        keep(weights, name, name, buffer)
    for name, key, value in _moments(model, optimizer):
        if _holding(model, name).copy:
            continue
        keep(moments, f"state.{name}.{key}", name, value)
    return weights, moments


@torch.no_grad()
def restore(model: Spread, optimizer: torch.optim.Optimizer, weights: State, moments: State) -> None:
    """Set what this rank holds from the whole state; KeyError or ValueError if it does not fit."""
    known = {name for name, _ in (*parameters_of(model), *_buffers(model))}
    if model.mesh.size("pp") == 1 and set(weights) != known:
        raise ValueError(f"it holds {', '.join(sorted(set(weights) ^ known)[:3])} or lacks it")
    for name, parameter in parameters_of(model):
        weight = _as_kept(weights[_original(model, name)], parameter)
        _copy(part_of(weight, model, name, like=parameter), local(parameter))
    for name, buffer in _buffers(model):
        _copy(_as_kept(weights[name], buffer), buffer)
    if not moments:  # an optimizer without memory (SGD without momentum) has nothing to restore
        return
    by_name: dict[str, State] = {}
    for path, value in moments.items():
        name, _, key = path.removeprefix("state.").rpartition(".")
        by_name.setdefault(name, {})[key] = value
    if model.sharded:
        for piece in (piece for bucket in model.sharded for piece in bucket.pieces if piece.name):
            for key, value in by_name.get(_original(model, piece.name), {}).items():
                value = _as_kept(value, piece.own)
                if value.dim():
                    value = piece.of(part_of(value, model, piece.name))
                optimizer.state[piece.own][key] = value.to(piece.own.device, copy=True)
        # What fills up a bucket has moments of zeros; compressors ask for those of all pieces.
        sample = next(iter(by_name.values()))
        for own in (piece.own for bucket in model.sharded for piece in bucket.pieces if not piece.name):
            for key, value in sample.items():
                filled = own.new_zeros(own.shape, dtype=value.dtype) if value.dim() else value.to(own.device, copy=True)
                optimizer.state[own][key] = filled
        return
    for name, parameter in parameters_of(model):
        # An optimizer keeps nothing of a parameter that never had a gradient.
        for key, value in by_name.get(_original(model, name), {}).items() if parameter.requires_grad else ():
            value = _as_kept(value, parameter)
            if value.dim():
                value = part_of(value, model, name, like=parameter)
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


def parameters_of(model: Spread) -> Iterator[tuple[str, nn.Parameter]]:
    """Each parameter once: a tied one under its first name."""
    for module in model.stages.values():
        yield from module.named_parameters()


def _buffers(model: Spread) -> Iterator[tuple[str, Tensor]]:
    """Buffers that belong to the state (running means, not caches)."""
    for module in model.stages.values():
        parameters = dict(module.named_parameters(remove_duplicate=False))
        for name, value in module.state_dict(keep_vars=True).items():
            if name not in parameters:
                yield name, value


def _moments(model: Spread, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, str, Tensor]]:
    """Name of the parameter, key, and value: gathered along dp_shard where ZeRO shards it."""
    if model.sharded:
        for bucket in model.sharded:
            yield from bucket.remembered(lambda own: _remembered(optimizer, own))
        return
    for name, parameter in parameters_of(model):
        for key, value in _remembered(optimizer, parameter).items():
            if value is not None:  # SGD without momentum
                yield name, key, value


def _remembered(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """The state of a parameter; one that is packed, without packing, in tensors that can be cut and joined."""
    unpacked: Any = getattr(optimizer, "unpacked", None)
    return optimizer.state.get(parameter, {}) if unpacked is None else unpacked(parameter)


def _holding(model: Spread, name: str) -> ShardSpec:
    return model.holdings.get(name, ShardSpec())


def _original(model: Spread, name: str) -> str:
    """Under which name a parameter is saved: a copy of a tied weight under that of the first."""
    return _holding(model, name).tied or name


def whole_of(local: Tensor, holding: ShardSpec, mesh: Mesh) -> Tensor:
    """The uncut tensor from this rank's part (collective)."""
    tensor = (_unsharded(local) if isinstance(local, DTensor) else local).detach()
    if holding.pattern is not None:
        return holding.pattern.spread(tensor)
    for axis, dim in reversed(holding.cuts.items()):
        group = mesh.group(axis)
        assert group is not None
        tensor = all_gather_no_grad(tensor, group, dim)
    return tensor


def _unsharded(tensor: DTensor) -> Tensor:
    """Return the whole tensor from the rows that `fully_shard` has left on each rank (collective).

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


def part_of(tensor: Tensor, model: Spread, name: str, like: Tensor | None = None) -> Tensor:
    """What this rank holds of an uncut tensor; if sharded `like` a DTensor, the rows that `fully_shard` gives it."""
    mesh, held = model.mesh, _holding(model, name)
    if held.pattern is not None:
        return held.pattern.taken(tensor)
    for axis, dim in held.cuts.items():
        tensor = tensor.chunk(mesh.size(axis), dim)[mesh.index(axis)]
    if isinstance(like, DTensor):
        rows, index = tensor.chunk(mesh.size("dp_shard"), 0), mesh.index("dp_shard")
        tensor = rows[index] if index < len(rows) else tensor[:0]
    return tensor


def _as_stored(tensor: Tensor) -> Tensor:
    """The tensor as a file of safetensors can hold it: it knows complex numbers of float32 only, others go as pairs."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.dtype == torch.complex128 else tensor


def _as_kept(stored: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_as_stored`, for a parameter or buffer `like` this one; its scalars stay as they are."""
    paired = like.is_complex() and not stored.is_complex() and stored.dim()
    return torch.view_as_complex(stored.contiguous()) if paired else stored


def _copy(source: Tensor, target: Tensor) -> None:
    if source.shape != target.shape:  # copy_ would broadcast
        raise ValueError(f"a tensor of shape {list(source.shape)} was saved where {list(target.shape)} is needed")
    target.copy_(source)
