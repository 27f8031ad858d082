"""What the blocks of a chain cost, so that pipeline stages can be cut to take equally long.

The slowest stage sets the pace of a pipeline. Blocks rarely cost the same: an embedding is nearly free, a head over a
large vocabulary is not, and an MLP may be wider here than there. `cost` measures each block once before the cut, on
one rank for all; the cut itself is exact (labkit.parallel.stages.minimal_maximum).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from labkit.experiment.layout import Layout
from labkit.parallel import stages
from labkit.parallel.cast import as_reals, widen
from labkit.parallel.transfer import on_device
from labkit.workloads.base import Batch, Blocks, Task
from labkit.workloads.same_buffers import same_buffers

REPEATS = 5
"""Measurements of each block, of which the first only warms up."""

Sample = Callable[[], Batch]
"""Makes a micro-batch to measure with."""


def stage_lengths(layout: Layout, task: Task, device: torch.device, sample: Sample) -> list[int]:
    """Return the number of blocks of every stage, as `layout.stage_blocks` or `layout.balance` asks.

    Collective if the blocks are measured. Raises ValueError if the blocks cannot be cut into that many stages.
    """
    assert isinstance(task.model, Blocks)
    count = layout.pp * layout.stages_per_rank
    blocks = len(task.model.blocks)
    if layout.stage_blocks is not None:
        if len(layout.stage_blocks) != count or sum(layout.stage_blocks) != blocks:
            raise ValueError(f"stage_blocks {list(layout.stage_blocks)} do not cut {blocks} blocks into {count} stages")
        return list(layout.stage_blocks)
    if layout.balance == "parameters":
        costs = [float(sum(p.numel() for p in block.parameters())) for block in task.model.blocks.values()]
    elif layout.balance == "cost":
        costs = _measure_on_rank_0(task, device, sample)
    else:
        costs = [1.0] * blocks
    return stages.minimal_maximum(costs, count)


def _measure_on_rank_0(task: Task, device: torch.device, sample: Sample) -> list[float]:
    """Measure the blocks on rank 0 and broadcast the result: every rank would measure something else (collective)."""
    assert isinstance(task.model, Blocks)
    costs = torch.zeros(len(task.model.blocks), dtype=torch.float64, device=device)
    if dist.get_rank() == 0:
        with same_buffers(task.model):
            costs.copy_(torch.tensor(measure_blocks(task, sample(), device), dtype=torch.float64))
    dist.broadcast(costs, 0)
    return [float(cost) for cost in costs.tolist()]


def measure_blocks(task: Task, batch: Batch, device: torch.device) -> list[float]:
    """Return the median seconds of a forward and a backward pass of every block over this batch, which is on `device`.

    The device holds one block at a time: a pipeline may exist because it cannot hold all of them.
    """
    assert isinstance(task.model, Blocks)
    blocks = list(task.model.blocks.values())
    measurements: list[list[float]] = [[] for _ in blocks]
    for _ in range(REPEATS):
        x: Tensor = batch["x"]
        for number, block in enumerate(blocks):
            with on_device(block, device):
                x = x.detach().requires_grad_(x.is_floating_point() or x.is_complex())
                begun = _now(x)
                out: Tensor = block(x)
                last = number == len(blocks) - 1
                loss = task.loss(widen(out), batch) if last else as_reals(out).sum()
                loss.backward()
                measurements[number].append(_now(x) - begun)
                x = out
                for parameter in block.parameters():
                    parameter.grad = None  # those of the whole model may not fit
    return [median(seconds[1:]) for seconds in measurements]


def _now(x: Tensor) -> float:
    if x.device.type == "cuda":
        torch.cuda.current_stream(x.device).synchronize()
    return time.perf_counter()
