"""What happens below the rules on two real ranks: each demonstration runs in a pair of processes over gloo."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
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
from labkit.parallel.mesh import Mesh
from labkit.parallel.pipeline import Pipeline
from labkit.parallel.shard import FullySharded
from labkit.parallel.stages import held_by

WIDTH, SAMPLES, MICROBATCHES, STEPS = 4, 8, 4, 4
CPU = torch.device("cpu")


def both(*demonstrations: Callable[[], Any]) -> dict[str, list[Any]]:
    """Run each on two ranks, one after the other; what it returned, or the error it met, on every rank."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (folder, demonstrations), nprocs=2)
        found = [torch.load(Path(folder, f"found-{rank}"), weights_only=True) for rank in (0, 1)]
    return {each.__name__: [part[each.__name__] for part in found] for each in demonstrations}


def _rank(rank: int, folder: str, demonstrations: tuple[Callable[[], Any], ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    found = {}
    for number, demonstration in enumerate(demonstrations):
        # A pair of its own for each: after an error in the middle of an exchange the old one is of no use.
        dist.init_process_group("gloo", init_method=f"file://{folder}/store-{number}", rank=rank, world_size=2)
        try:
            found[demonstration.__name__] = demonstration()
        except Exception as error:
            found[demonstration.__name__] = f"{type(error).__name__}: {error}"
        with suppress(Exception):
            dist.destroy_process_group()
    _save(found, Path(folder, f"found-{rank}"))
    os._exit(0)  # threads of a broken exchange may outlive the interpreter


def _save(found: dict[str, Any], path: Path) -> None:
    torch.serialization.save(found, path)
