"""ZeRO stage 3: parameters, gradients and optimizer state are sharded, by torch's `fully_shard` (FSDP2).

Each block gathers its parameters just before it needs them and frees them afterwards (Rajbhandari et al. 2020; Zhao et
al. 2023, "PyTorch FSDP"). With dp_replicate in addition to dp_shard, shards are replicated: hybrid sharding (HSDP).

Inside a pipeline the gradients are not reduced before the schedule is over. A schedule that splits the backward pass
computes weight gradients outside of autograd's own run, where FSDP's hooks do not see them: with torch 2.13 the
zero-bubble schedules then train silently wrong. So parameters stay gathered during the schedule, and one reduce-scatter
follows it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from labkit.parallel.cut import ShardSpec
from labkit.parallel.decay import with_decay_flags
from labkit.parallel.mesh import Mesh
from labkit.parallel.sync import Zero1Bucket, norm_share, summed_axes
from labkit.workloads.base import Blocks

AXES = ("dp_replicate", "dp_shard")
"""Axes over which `fully_shard` averages gradients."""
_ABLE = ("torch.nn.", "labkit.", "transformers.")
"""Packages whose layers compute with weights in bfloat16 under autocast."""
FINALIZES = hasattr(FSDPModule, "finalize_backward")
"""True if the caller can mark the end of a backward pass (torch 2.15)."""


class FullySharded:
    """The modules of one rank under `fully_shard`: the same methods as `GradientSync`."""

    sharded: tuple[Zero1Bucket, ...] = ()
    """Always empty: `fully_shard` uses no buckets of labkit."""

    def __init__(
        self,
        modules: Iterable[nn.Module],
        shard_specs: dict[str, ShardSpec],
        mesh: Mesh,
        offload: bool,
        products: torch.dtype | None = None,
    ) -> None:
        self._mesh, self._shard_specs = mesh, shard_specs
        self._modules = [_shard(module, mesh, offload, products) for module in modules]
        self._scheduled = False
        self.averaged_over = mesh.size(*AXES)

    def begin_pass(self, last: bool, scheduled: bool) -> None:
        """Prepare a pass. During a schedule all parameters stay gathered, and no gradients are reduced."""
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
        """Reduce what a pass has left to reduce; after the `last` one the gradients of the update are complete."""
        if self._scheduled:
            for module in self._modules:
                _reduce_scatter_gradients(module)
        if last:
            self._sum_rest()

    def _sum_rest(self) -> None:
        """Sum gradients over the axes that `fully_shard` does not know."""
        by_axes: dict[tuple[str, ...], list[Tensor]] = {}
        for name, parameter in self._named_parameters():
            axes = tuple(axis for axis in summed_axes(self._shard_specs[name]) if axis not in AXES)
            if self._mesh.group(*axes) is not None and parameter.grad is not None:
                by_axes.setdefault(axes, []).append(to_local(parameter.grad))
        for axes, gradients in by_axes.items():
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat, group=self._mesh.group(*axes))
            for gradient, piece in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(piece.view_as(gradient))

    def _named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        for module in self._modules:
            yield from module.named_parameters()  # type: ignore[attr-defined]

    def optimizer_parameters(self) -> list[tuple[nn.Parameter, bool]]:
        """Return the parameters that the optimizer updates, each with whether weight decay applies to it."""
        return with_decay_flags(parameter for _, parameter in self._named_parameters())

    def after_update(self) -> None:
        """Remove all gradients after an optimizer step."""
        for _, parameter in self._named_parameters():
            parameter.grad = None

    def wait_for_parameters(self, module: nn.Module | None = None) -> None:
        """Do nothing: `fully_shard` gathers parameters just before they are used."""

    def norm_terms(self) -> Iterable[tuple[Tensor, float]]:
        """Yield each gradient of this rank with the factor of its squared norm in the global one."""
        for name, parameter in self._named_parameters():
            if parameter.grad is not None:
                yield (
                    to_local(parameter.grad),
                    self._mesh.size("dp_shard") * norm_share(self._shard_specs[name], self._mesh),
                )

    def tied_gradients(self) -> Iterable[tuple[str, Tensor]]:
        """Yield (name, gradient) of the weights that other stages hold too."""
        for name, parameter in self._named_parameters():
            tied = self._shard_specs[name].tied
            if tied and parameter.grad is not None:
                yield tied, to_local(parameter.grad)


def _shard(module: nn.Module, mesh: Mesh, offload: bool, products: torch.dtype | None) -> FSDPModule:
    """Shard every block of a chain, then the rest of the module, in place; return the module.

    Blocks that share a weight belong to the rest, which is gathered once for both. With `offload`, this rank's shards
    are kept in the host's memory and copied to the GPU for as long as a block is gathered. With `products`, the dtype
    in which autocast computes products, weights are gathered in it, which sends half of the bytes; the shards, their
    gradients and the sums of these stay in float32.
    """
    policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP accepts no others; most are contiguous already
    submesh = mesh.submesh(*(axis for axis in AXES if mesh.size(axis) > 1))
    blocks = list(module.blocks.values()) if isinstance(module, Blocks) else []
    uses = Counter(id(parameter) for block in blocks for parameter in block.parameters())
    own = [block for block in blocks if all(uses[id(parameter)] == 1 for parameter in block.parameters())]
    precisions = [(part, _precision(part, products)) for part in (*own, module)]
    for part, precision in precisions:  # nothing may refer to its parameters any more, or the full ones stay in memory
        fully_shard(part, mesh=submesh, offload_policy=policy, mp_policy=precision)
    return module  # type: ignore[return-value]


def _precision(module: nn.Module, products: torch.dtype | None) -> MixedPrecisionPolicy:
    """Return the policy by which weights are gathered in the dtype of products, if all layers can compute with that.

    Layers of torch, labkit and transformers can, but for batch norms and recurrent layers; of others nothing is known.
    """
    unable = (nn.modules.batchnorm._BatchNorm, nn.RNNBase)
    able = all(type(m).__module__.startswith(_ABLE) and not isinstance(m, unable) for m in module.modules())
    if products is None or not able:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(products, torch.float32, cast_forward_inputs=False)


def _sharded_parts(module: Any) -> Iterable[FSDPModule]:
    return (part for part in module.modules() if isinstance(part, FSDPModule))


def _reduce_scatter_gradients(module: FSDPModule) -> None:
    """Reduce-scatter the gradients of all micro-batches and free the gathered parameters."""
    module.set_reshard_after_backward(True)
    module.set_requires_gradient_sync(True)
    if FINALIZES:
        _as_any(module).finalize_backward()
        _as_any(module).set_manual_backward_finalization(False)
        return
    module.set_is_last_backward(True)
    # As torch's own pipeline stage does it (torch.distributed.pipelining.stage): before 2.15 there is no public call.
    state: Any = fully_shard.state(module)  # type: ignore[attr-defined]
    for member in state._state_ctx.all_states:
        for group in _groups(member):
            group.post_backward()
    state._root_post_backward_final_callback()


def _as_any(module: Any) -> Any:
    """Return the module untyped, for calls that the pinned torch does not have."""
    return module


def _groups(state: Any) -> list[Any]:
    """Return the parameter groups of one module under `fully_shard`; before torch 2.12 there is at most one."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is not None:
        return list(groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def to_local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, and any other tensor as it is."""
    shard: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return shard
