"""ZeRO stage 3: parameters, gradients and optimizer state are sharded, by torch's `fully_shard` (FSDP2).

Each block gathers its parameters just before it needs them and frees them afterwards (Rajbhandari et al. 2020; Zhao et
al. 2023, "PyTorch FSDP"). With dp_replicate beside dp_shard, shards are replicated: hybrid sharding (HSDP).

Inside a pipeline the exchange waits until the schedule is over. A schedule that splits the backward pass computes
weight gradients outside of autograd's own run, where FSDP's hooks do not see them: with torch 2.13 the zero-bubble
schedules then train silently wrong. So parameters stay gathered during the schedule, and one exchange follows it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from labkit.parallel.mesh import Mesh


def shard(module: nn.Module, blocks: list[nn.Module], mesh: Mesh) -> None:
    """Shard every block of `module`, then what is left of it, in place."""
    axes = ("dp_replicate", "dp_shard") if mesh.size("dp_replicate") > 1 else ("dp_shard",)
    grid = mesh.sub(*axes)
    for block in blocks:
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=grid)
    fully_shard(module, mesh=grid)


def averaged_over(mesh: Mesh) -> int:
    """FSDP divides by the number of ranks; the loss is multiplied by as many, because labkit adds up."""
    return mesh.size("dp_replicate", "dp_shard")


def hold_back(module: nn.Module) -> None:
    """Before a pipeline schedule: gather all parameters, exchange nothing."""
    fsdp = _fsdp(module)
    fsdp.set_requires_gradient_sync(False)
    fsdp.set_reshard_after_backward(False)
    fsdp.set_reshard_after_forward(False)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.unshard()


def exchange(module: nn.Module) -> None:
    """After the schedule: reduce-scatter the gradients of all microbatches, free the gathered parameters."""
    fsdp = _fsdp(module)
    fsdp.set_is_last_backward(True)
    fsdp.set_reshard_after_backward(True)
    fsdp.set_requires_gradient_sync(True)
    # As torch's own pipeline stage does: there is no public call for it (torch.distributed.pipelining.stage).
    state: Any = fully_shard.state(fsdp)  # type: ignore[attr-defined]
    for member in state._state_ctx.all_states:
        for group in member._fsdp_param_groups:
            group.post_backward()
    state._root_post_backward_final_callback()


def local(tensor: Tensor) -> Tensor:
    """The part of a (possibly sharded) tensor that this rank holds."""
    found: Tensor = tensor.to_local() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor
    return found


def _fsdp(module: nn.Module) -> FSDPModule:
    assert isinstance(module, FSDPModule)
    return module
