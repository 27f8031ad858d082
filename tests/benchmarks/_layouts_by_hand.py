"""Four layouts of the GPT written by hand with torch alone: what labkit's layouts are measured against.

    python _layouts_by_hand.py LAYOUT RANK STORE STEPS FILE

LAYOUT is fsdp (2 ranks), tp (2), pp (2, 1F1B with 4 microbatches) or 2d (fsdp × tp, 4). Data and model come from the
workload, so that only the loop differs. Rank 0 writes the seconds of every step and the losses of the first ones.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

SEED, BATCH, LR, WEIGHT_DECAY, MICROBATCHES = 0, 16, 5e-3, 0.1, 4
WORKLOAD = {"depth": 4, "width": 128, "heads": 4, "context": 64}
RANKS = {"fsdp": 2, "tp": 2, "pp": 2, "2d": 4}
COMPARED = 3
"""Steps whose losses are written down; they belong to the warm-up."""


def build() -> Any:
    from labkit.workloads.language import Language

    return Language.build(Language.Options(**WORKLOAD), SEED)


def cut_layers(model: Any, mesh: Any) -> None:
    """Megatron's plan for the GPT in torch's words."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan: dict[str, Any] = {
        "blocks.embed.token": RowwiseParallel(input_layouts=Replicate()),
        "blocks.head.score": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    for name in model.blocks:
        if name.startswith("layer"):
            for part in ("attention.query", "attention.key", "attention.value", "mlp.up"):
                plan[f"blocks.{name}.{part}"] = ColwiseParallel()
            for part in ("attention.out", "mlp.down"):
                plan[f"blocks.{name}.{part}"] = RowwiseParallel()
    parallelize_module(model, mesh, plan)


def shard(model: Any, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks.values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def optimizer(model: Any) -> Any:
    """Fused AdamW; biases and gains do not decay. One group for every mesh: fused kernels take no mixture of them."""
    import torch
    from torch.distributed.tensor import DTensor

    groups: dict[tuple[bool, Any], list[Any]] = {}
    for parameter in model.parameters():
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault((parameter.dim() >= 2, mesh), []).append(parameter)
    param_groups = [
        {"params": parameters, "weight_decay": WEIGHT_DECAY * decays} for (decays, _), parameters in groups.items()
    ]
    return torch.optim.AdamW(param_groups, lr=LR, fused=True)


def parallelize(layout: str, task: Any) -> tuple[Any, int, int, Callable[[Any], Any]]:
    """Return this rank's model, the index of its share of the batch, the number of shares, and its training pass.

    The pass runs forward and backward and returns the mean loss of its samples; None if this rank does not have it.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import loss_parallel

    model, cut = task.model, False
    share, shares = 0, 1
    if layout == "pp":
        return pipeline(task)
    if layout in ("tp", "2d"):
        shape, names = ((2,), ("tp",)) if layout == "tp" else ((2, 2), ("dp", "tp"))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        cut_layers(model, mesh["tp"])
        cut = True
    else:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    if layout in ("fsdp", "2d"):
        shard(model, mesh["dp"])
        share, shares = mesh.get_local_rank("dp"), 2

    def run(batch: Any) -> Any:
        with loss_parallel() if cut else nullcontext():
            loss = torch.nn.functional.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten())
            loss.backward()
        return loss.full_tensor() if cut else loss

    return model, share, shares, run


def pipeline(task: Any) -> tuple[Any, int, int, Callable[[Any], Any]]:
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    rank, blocks = dist.get_rank(), list(task.model.blocks.values())
    half = len(blocks) // 2
    model = nn.Sequential(*(blocks[half:] if rank else blocks[:half]))
    stage = PipelineStage(model, rank, 2, torch.device("cpu"))
    schedule = Schedule1F1B(
        stage,
        MICROBATCHES,
        loss_fn=lambda output, y: torch.nn.functional.cross_entropy(output.flatten(0, 1), y.flatten()),
    )

    def run(batch: Any) -> Any:
        losses: list[Any] = []
        if rank == 0:
            schedule.step(batch["x"])
            return None
        schedule.step(target=batch["y"], losses=losses, return_outputs=False)
        return torch.stack(losses).mean()

    return model, 0, 1, run


def main(layout: str, rank: int, store: str, steps: int, result: str) -> None:
    """A plain loop; the loss of the first steps is averaged over the ranks that know it."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import numpy as np
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS[layout])
    task = build()
    model, share, shares, run = parallelize(layout, task)
    update = optimizer(model)
    length = len(task.train)
    epochs = [np.random.default_rng([SEED, epoch]).permutation(length) for epoch in range(-(-steps * BATCH // length))]
    order = np.concatenate(epochs)
    part = BATCH // shares
    model.train()
    seconds, losses = [], []
    for step in range(steps):
        begun = time.perf_counter()
        begin = step * BATCH + share * part
        loss = run(task.train.__getitems__(order[begin : begin + part].tolist()))
        update.step()
        update.zero_grad()
        seconds.append(time.perf_counter() - begun)
        if step < COMPARED:
            loss_and_count = torch.zeros(2) if loss is None else torch.stack([loss.detach(), torch.ones(())])
            dist.all_reduce(loss_and_count)
            losses.append(float(loss_and_count[0] / loss_and_count[1]))
    if rank == 0:
        with open(result, "w") as file:
            json.dump({"seconds": seconds, "losses": losses}, file)
    dist.barrier()
    # Not the interpreter's own end: gloo's threads may outlive it, which now and then ends in std::terminate.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5])
