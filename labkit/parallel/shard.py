"""ZeRO stage 3: parameters, gradients and optimizer state are sharded, by torch's `fully_shard` (FSDP2).

Each block gathers its parameters just before it needs them and frees them afterwards (Rajbhandari et al. 2020; Zhao et
al. 2023, "PyTorch FSDP"). With dp_replicate beside dp_shard, shards are replicated: hybrid sharding (HSDP).

Inside a pipeline the exchange waits until the schedule is over. A schedule that splits the backward pass computes
weight gradients outside of autograd's own run, where FSDP's hooks do not see them: with torch 2.13 the zero-bubble
schedules then train silently wrong. So parameters stay gathered during the schedule, and one exchange follows it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from labkit.parallel.cut import ShardSpec
from labkit.parallel.decay import by_shape
from labkit.parallel.mesh import Mesh
from labkit.parallel.sync import Zero1Bucket, share, summed_axes
from labkit.workloads.base import Blocks

AXES = ("dp_replicate", "dp_shard")
"""Over these `fully_shard` adds gradients up, and divides by the number of ranks."""
FINALIZES = hasattr(FSDPModule, "finalize_backward")
"""Can the end of a backward pass be said from outside (torch 2.15)?"""


class FullySharded:
    """The modules of one rank under `fully_shard`: the same methods as `GradientSync`."""

    sharded: tuple[Zero1Bucket, ...] = ()
    """It has no buckets of ours."""

    def __init__(self, modules: Iterable[nn.Module], holdings: dict[str, ShardSpec], mesh: Mesh, offload: bool) -> None:
        self._mesh, self._holdings = mesh, holdings
        self._modules = [_shard(module, mesh, offload) for module in modules]
        self._scheduled = False
        self.averaged_over = mesh.size(*AXES)

    def begin_pass(self, last: bool, scheduled: bool) -> None:
        """Before a pass. During a schedule all parameters stay gathered, and nothing is exchanged."""
        self._scheduled = scheduled
        for module in self._modules:
            module.set_requires_gradient_sync(last and not scheduled)
            if scheduled:
                if FINALIZES:
                    _as_any(module).set_manual_backward_finalization(True)
                module.set_reshard_after_backward(False)
                module.set_reshard_after_forward(False)
                for part in _sharded_parts(module):
                    part.unshard()

    def end_pass(self, last: bool) -> None:
        """After a pass; after the `last` one the update's gradients are complete."""
        if self._scheduled:
            for module in self._modules:
                _exchange(module)
        if last:
            self._sum_rest()

    def _sum_rest(self) -> None:
        """Sum over the axes that `fully_shard` does not know."""
        rows: dict[tuple[str, ...], list[Tensor]] = {}
        for name, parameter in self._named_parameters():
            axes = tuple(axis for axis in summed_axes(self._holdings[name]) if axis not in AXES)
            if self._mesh.group(*axes) is not None and parameter.grad is not None:
                rows.setdefault(axes, []).append(local(parameter.grad))
        for axes, gradients in rows.items():
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat, group=self._mesh.group(*axes))
            for gradient, piece in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(piece.view_as(gradient))

    def _named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        for module in self._modules:
            yield from module.named_parameters()  # type: ignore[attr-defined]

    def optimized(self) -> list[tuple[nn.Parameter, bool]]:
        """What the optimizer works on, and whether it decays."""
        return by_shape(parameter for _, parameter in self._named_parameters())

    def after_update(self) -> None:
        """The optimizer has stepped: gradients start from nothing again."""
        for _, parameter in self._named_parameters():
            parameter.grad = None

    def terms(self) -> Iterable[tuple[Tensor, float]]:
        """Every gradient of this rank with the share of its squared norm that this rank adds to the global one."""
        for name, parameter in self._named_parameters():
            if parameter.grad is not None:
                yield local(parameter.grad), self._mesh.size("dp_shard") * share(self._holdings[name], self._mesh)

    def tied(self) -> Iterable[tuple[str, Tensor]]:
        """Gradients of weights that other stages hold too."""
        for name, parameter in self._named_parameters():
            tie = self._holdings[name].tied
            if tie and parameter.grad is not None:
                yield tie, local(parameter.grad)


def _shard(module: nn.Module, mesh: Mesh, offload: bool) -> FSDPModule:
    """Shard every block of a chain, then what is left of it, in place.

    Blocks that share a weight belong to what is left: it is gathered once for both. With `offload`, what this rank
    owns lies in the host's memory and is brought to the GPU for as long as a block is gathered.
    """
    policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP takes no others; most are so already
    grid = mesh.sub(*(axis for axis in AXES if mesh.size(axis) > 1))
    blocks = list(module.blocks.values()) if isinstance(module, Blocks) else []
    held = Counter(parameter for block in blocks for parameter in block.parameters())
    for block in blocks:
        if all(held[parameter] == 1 for parameter in block.parameters()):
            fully_shard(block, mesh=grid, offload_policy=policy)
    return fully_shard(module, mesh=grid, offload_policy=policy)


def _sharded_parts(module: Any) -> Iterable[FSDPModule]:
    return (part for part in module.modules() if isinstance(part, FSDPModule))


def _exchange(module: FSDPModule) -> None:
    """Reduce-scatter the gradients of all microbatches, free the gathered parameters."""
    module.set_reshard_after_backward(True)
    module.set_requires_gradient_sync(True)
    if FINALIZES:
        _as_any(module).finalize_backward()
        _as_any(module).set_manual_backward_finalization(False)
        return
    module.set_is_last_backward(True)
    # As torch's own pipeline stage does (torch.distributed.pipelining.stage): before 2.15 there is no public call.
    state: Any = fully_shard.state(module)  # type: ignore[attr-defined]
    for member in state._state_ctx.all_states:
        for group in _groups(member):
            group.post_backward()
    state._root_post_backward_final_callback()


def _as_any(module: Any) -> Any:
    """The module, for calls that the pinned torch does not have."""
    return module


def _groups(state: Any) -> list[Any]:
    """The groups of parameters of one module under `fully_shard`; before torch 2.12 there is at most one."""
    several = getattr(state, "_fsdp_param_groups", None)
    if several is not None:
        return list(several)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def local(tensor: Tensor) -> Tensor:
    """The part of a (possibly sharded) tensor that this rank holds."""
    found: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return found
