"""The vision recipe written by hand: what labkit is measured against.

    python _by_hand.py ddp RANK STORE STEPS FILE BUCKET  torch DistributedDataParallel over gloo, file rendezvous;
                                                     BUCKET in MB, `default`, or `none` for no exchange at all
    accelerate launch … _by_hand.py accelerate FILE  the same through Accelerate

Both take the data and the model from the workload, so that only the loop differs.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import nullcontext
from typing import Any

SEED, BATCH, LR, WEIGHT_DECAY = 0, 64, 2e-3, 0.05


def build() -> Any:
    from labkit.experiment.recipes import vision_ddp
    from labkit.workloads.vision import Vision

    return Vision.build(Vision.Options(**vision_ddp().workload.options), SEED)


def first_step_with_accelerate(stamp: str) -> None:
    """An ordinary Accelerate script up to the end of its first step; then writes the time to `stamp`."""
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2, f"{accelerator.num_processes} processes"
    task = build()
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    model, optimizer = accelerator.prepare(task.model, optimizer)
    share = BATCH // accelerator.num_processes
    begin = accelerator.process_index * share
    batch = task.train.__getitems__(list(range(begin, begin + share)))
    accelerator.backward(task.loss(model(batch["x"]), batch))
    optimizer.step()
    optimizer.zero_grad()
    if accelerator.is_main_process:
        with open(stamp, "w") as file:
            file.write(str(time.monotonic()))


def ddp(rank: int, store: str, steps: int, result: str, bucket: str) -> None:
    """A plain torch DDP loop with fused AdamW; writes the seconds of every step to `result`."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import numpy as np
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    task = build()
    size = None if bucket in ("default", "none") else float(bucket)
    model = DistributedDataParallel(task.model, gradient_as_bucket_view=True, bucket_cap_mb=size)
    # As in the recipe, biases and gains do not decay: two groups of parameters.
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, fused=True)
    order = np.random.default_rng(SEED)
    permutation = np.concatenate(
        [order.permutation(len(task.train)) for _ in range(-(-steps * BATCH // len(task.train)))]
    )
    share = BATCH // 2
    model.train()
    seconds = []
    for step in range(steps):
        begun = time.perf_counter()
        begin = step * BATCH + rank * share
        batch = task.train.__getitems__(permutation[begin : begin + share].tolist())
        with model.no_sync() if bucket == "none" else nullcontext():
            loss = task.loss(model(batch["x"]), batch)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begun)
    if rank == 0:
        with open(result, "w") as file:
            json.dump(seconds, file)
    dist.barrier()
    # Not the interpreter's own end: gloo's threads may outlive it, which now and then ends in std::terminate.
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "ddp":
        ddp(int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5], sys.argv[6])
    else:
        first_step_with_accelerate(sys.argv[2])
