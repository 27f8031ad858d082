"""What happens below the rules, shown on real ranks: torch's own pipeline and collectives with what labkit refuses."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as torch_schedules

from labkit.experiment import Layout
from labkit.experiment.schedules import SCHEDULES
from labkit.parallel.cut import shard_spec_of
from labkit.parallel.mesh import Mesh
from labkit.parallel.pipeline import Pipeline
from labkit.parallel.shard import FullySharded
from labkit.parallel.stages import stages_of_rank
from labkit.workloads.base import Blocks

SAMPLES, MICROBATCHES, STEPS = 8, 4, 4
SPLITTING = ("interleaved_zero_bubble", "zbv", "dualpipev")
"""These compute the gradients of inputs and of weights apart."""


def on_ranks(count: int, *demonstrations: Callable[[], Any]) -> dict[str, list[Any]]:
    """Run each on `count` ranks; what it returned, or the error it met, on every rank."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (count, folder, demonstrations), nprocs=count)
        found = [json.loads(Path(folder, f"found-{rank}").read_text()) for rank in range(count)]
    return {each.__name__: [part[each.__name__] for part in found] for each in demonstrations}


def _rank(rank: int, count: int, folder: str, demonstrations: tuple[Callable[[], Any], ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    found = {}
    for demonstration in demonstrations:
        try:
            found[demonstration.__name__] = demonstration()
        except Exception as error:
            found[demonstration.__name__] = f"{type(error).__name__}: {error}"
        dist.barrier()
    Path(folder, f"found-{rank}").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # gloo's threads may outlive the interpreter


# -- sharding inside a schedule ---------------------------------------------------------------------------------------


def _stages() -> list[nn.Module]:
    """Four stages of two blocks each."""
    torch.manual_seed(0)
    names = ("one", "two")
    return [Blocks({name: nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for name in names}).double() for _ in range(4)]


def _data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(SAMPLES, 4, dtype=torch.float64), torch.randn(SAMPLES, 4, dtype=torch.float64)


def alone() -> list[float]:
    """Losses of one process."""
    model, (x, y) = nn.Sequential(*_stages()), _data()
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.5), []
    for _ in range(STEPS):
        loss = (model(x) - y).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def _train(parameters: Any, update: Callable[[], list[Tensor]], share: int, ranks: int) -> list[float]:
    """Losses of the whole batch, on all ranks; `update` returns the own part's sum of losses of microbatches."""
    optimizer, found = torch.optim.SGD(list(parameters), 0.5), []
    for _ in range(STEPS):
        losses = update()
        total = torch.stack(losses).sum() if losses else torch.zeros((), dtype=torch.float64)
        dist.all_reduce(total)
        found.append(total.item() / share)
        optimizer.step()
        optimizer.zero_grad()
    return found


def sharded_in_torchs_schedules() -> dict[str, list[float]]:
    """Torch alone: `fully_shard` on blocks and stages of a pipeline of 2 × 2 ranks, as its documentation has it."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    place, part = mesh.get_local_rank("pp"), mesh.get_local_rank("dp")
    found = {}
    for schedule in ("interleaved_1f1b", *SPLITTING):
        mine = stages_of_rank(Layout(pp=2, stages_per_rank=2, schedule=schedule), place)
        held: Any = [_stages()[number] for number in mine]
        for stage in held:
            for block in stage.blocks.values():
                fully_shard(block, mesh=mesh["dp"])
            fully_shard(stage, mesh=mesh["dp"])
        stages = [
            PipelineStage(stage, number, 4, torch.device("cpu"), group=mesh.get_group("pp"))
            for number, stage in zip(mine, held, strict=True)
        ]
        runner = getattr(torch_schedules, SCHEDULES[schedule].torch_class)(
            stages, MICROBATCHES, loss_fn=lambda output, target: (output - target).square().mean()
        )
        x, y = (whole.chunk(2)[part] for whole in _data())

        def update(mine: Any = mine, runner: Any = runner, x: Tensor = x, y: Tensor = y) -> list[Tensor]:
            losses: list[Tensor] = []
            runner.step(*((x,) if 0 in mine else ()), target=y if 3 in mine else None, losses=losses)
            return losses

        parameters = [parameter for stage in held for parameter in stage.parameters()]
        found[schedule] = _train(parameters, update, 2 * MICROBATCHES, 4)
    return found


def sharded_in_labkits() -> dict[str, list[float]]:
    """The same through labkit: the exchange waits until the schedule is over."""
    found = {}
    for schedule in ("interleaved_1f1b", *SPLITTING):
        layout = Layout(pp=2, dp_shard=2, stages_per_rank=2, schedule=schedule, microbatches=MICROBATCHES)
        mesh = Mesh(layout, dist.get_rank(), "cpu")
        modules = {number: _stages()[number] for number in stages_of_rank(layout, mesh.index("pp"))}
        shard_specs = {name: shard_spec_of(p) for module in modules.values() for name, p in module.named_parameters()}
        sharded = FullySharded(modules.values(), shard_specs, mesh, offload=False)
        x, y = (whole.chunk(2)[mesh.index("dp_shard")] for whole in _data())

        def loss(output: Tensor, index: Tensor, y: Tensor = y) -> Tensor:
            return (output - y[index]).square().mean() / MICROBATCHES

        pipeline = Pipeline(modules, layout, mesh, torch.device("cpu"), loss)

        def update(sharded: Any = sharded, pipeline: Any = pipeline, x: Tensor = x) -> list[Tensor]:
            sharded.begin_pass(True, scheduled=True)
            losses: list[Tensor] = pipeline.run(x, len(x))
            sharded.end_pass(True)
            return losses

        parameters = [parameter for parameter, _ in sharded.optimizer_parameters()]
        found[schedule] = _train(parameters, update, 2, 4)
    return found


# -- microbatches of unequal size -------------------------------------------------------------------------------------


def unequal_microbatches() -> list[int]:
    """Seven samples in two microbatches through two stages of torch's GPipe; the shape of what comes out."""
    rank = dist.get_rank()
    stage = PipelineStage(nn.Linear(4, 4), rank, 2, torch.device("cpu"))
    schedule = torch_schedules.ScheduleGPipe(stage, 2, loss_fn=lambda output, target: output.sum())
    out = schedule.step(*((torch.ones(7, 4),) if rank == 0 else ()), target=torch.ones(7, 4) if rank else None)
    return list(out.shape) if rank else []
