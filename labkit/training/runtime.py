"""The runtime of one rank: threads, device, process group, Accelerator.

Accelerate keeps the process state, wraps the model in DDP and runs it under autocast; it neither gathers nor saves. The
process group is created here, because the rendezvous is a file in a private directory: no ports can collide, and
nothing listens beyond loopback.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed import distributed_c10d

from labkit.experiment import Experiment
from labkit.experiment.registry import registry
from labkit.experiment.run_directory import SLOW_FACTOR
from labkit.parallel.cast import at_least_float32, place_tensor
from labkit.parallel.mesh import Mesh
from labkit.parallel.model import offloads
from labkit.parallel.replicate import Replicate
from labkit.parallel.stages import pp_rank_of_last_stage
from labkit.workloads.seed import seed_generators

PATIENCE_S = 30.0
"""Seconds by which collectives time out later than the supervisor, which can name the rank at fault."""


@dataclass(frozen=True)
class Runtime:
    """Identity of one rank, and the device, process group and Accelerator that it works with."""

    rank: int
    """Rank in the run, also if ranks are isolated."""
    ranks: int
    """World size of the run."""
    device: torch.device
    dtype: torch.dtype
    accelerator: Accelerator
    precision: Any
    isolated: bool
    mesh: Mesh
    folder: Path
    """Private local folder for the rendezvous of this run's ranks."""
    timeout_s: float
    """Seconds after which a collective times out."""

    @classmethod
    def start(cls, experiment: Experiment, rank: int, rendezvous: str) -> Runtime:
        """Set up device, process group and Accelerator; block until all ranks have joined."""
        launch, ranks = experiment.launch, experiment.layout.world_size
        timeout_s = SLOW_FACTOR * launch.timeout_s + PATIENCE_S
        torch.set_num_threads(launch.threads_per_rank)
        alone = ranks == 1 or launch.isolated
        cpu = launch.device == "cpu"
        if not cpu:
            os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # the order of nvidia-smi
            if not torch.cuda.device_count():
                raise RuntimeError(
                    f"torch {torch.__version__} finds no GPU that it can use, although the driver shows one: install a "
                    "build of torch for the CUDA version of this driver (labkit doctor shows both)"
                )
            device = torch.device("cuda", rank % torch.cuda.device_count())
            torch.cuda.set_device(device)
            os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
            if not alone:  # Accelerate uses the local rank as the index of the GPU; here ranks may share a GPU
                os.environ["LOCAL_RANK"] = str(device.index)
        if not alone:
            _use_for_all_groups(timedelta(seconds=timeout_s))
            dist.init_process_group(
                ("cpu:gloo,cuda:" if offloads(experiment) else "") + backend(launch.device, ranks),
                init_method=f"file://{rendezvous}",
                rank=rank,
                world_size=ranks,
                timeout=timedelta(seconds=timeout_s),
            )
        precision = registry("quantization.training")[experiment.quantization.training].load()
        precision.prepare()
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=precision.mixed_precision,
            gradient_accumulation_steps=1,  # the loop weights its micro-batches itself
            kwargs_handlers=[Replicate.ddp_handler(experiment), *precision.handlers()],
            step_scheduler_with_optimizer=False,
        )
        # Training N separate models without noticing is the worst that can happen; several launchers do it.
        expected = 1 if alone else ranks
        if accelerator.num_processes != expected:
            raise RuntimeError(f"{accelerator.num_processes} processes have joined, {expected} were expected")
        layout, kind = experiment.layout, accelerator.device.type
        mesh = Mesh(layout, rank, kind, connect=layout.world_size > layout.dp_replicate)
        return cls(
            rank,
            ranks,
            accelerator.device,
            precision.dtype(),
            accelerator,
            precision,
            launch.isolated,
            mesh,
            Path(rendezvous).parent,
            timeout_s,
        )

    def on_host(self) -> Runtime:
        """Return the same runtime with the host's memory as its device, for a model that no single GPU can hold."""
        return replace(self, device=torch.device("cpu"))

    def place(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Move a batch to the device and convert the model's input `x` to the dtype of the run.

        Everything else, above all targets, keeps at least float32: losses are computed in float32, and in bfloat16 the
        years 1993 to 2007 are only five different numbers (issue 11, B 23).
        """
        wide = at_least_float32(self.dtype)
        return {
            name: place_tensor(tensor, self.device, self.dtype if name == "x" else wide)
            for name, tensor in batch.items()
        }

    def product_type(self) -> torch.dtype:
        """Return the dtype of the result of a matrix product under the autocast of this run."""
        matrix = torch.ones(1, 1, dtype=self.dtype, device=self.device)
        with self.accelerator.autocast():
            return (matrix @ matrix).dtype

    def seed(self, value: int) -> None:
        """Seed all random number generators: torch on this device, numpy, and Python's `random`."""
        seed_generators(value)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(value)

    def expect_gaps(self, experiment: Experiment) -> Experiment:
        """Prepare for passes that leave parameters without a gradient; return the experiment to build the model from.

        DDP then searches the graph of each pass for unused parameters. A sharded model reduces its buckets after the
        backward pass, in the same order on all ranks, so that none waits for a gradient that never comes.
        """
        ddp_handler = self.accelerator.ddp_handler
        if ddp_handler is not None:
            ddp_handler.find_unused_parameters = True
        return experiment.set({"gradients.overlap": False}) if self.is_sharded else experiment

    def add_up(self, sums: dict[str, float]) -> dict[str, float]:
        """All-reduce a dict of numbers (sum); all ranks pass the same keys and get the same result."""
        if self.accelerator.num_processes == 1:
            return sums
        if self.mesh.size("pp") > 1:  # only ranks with the last stage have results
            names: list[Any] = [sorted(sums)]
            dist.broadcast_object_list(names, self.mesh.first_rank_at(pp=pp_rank_of_last_stage(self.mesh.layout)))
            sums = dict.fromkeys(names[0], 0.0) | sums
        keys = sorted(sums)
        total = torch.tensor([sums[key] for key in keys], dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return dict(zip(keys, total.tolist(), strict=True))

    @property
    def is_sharded(self) -> bool:
        """True if one replica of the model is sharded over several ranks."""
        return self.ranks > self.mesh.layout.dp_replicate

    def meet(self) -> None:
        """Wait until all ranks have arrived (barrier)."""
        dist.barrier()

    def end(self) -> None:
        """Destroy the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _use_for_all_groups(timeout: timedelta) -> None:
    """Make `timeout` the default of the groups that torch and labkit make later.

    They would have torch's own, 10 minutes for NCCL and 30 for gloo, whatever the first group has (issue 13, 17).
    """
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout  # type: ignore[attr-defined]


def backend(device: str, ranks: int) -> str:
    """Return `nccl` if every rank has its own GPU, else `gloo`: on CPUs and shared GPUs (NCCL refuses to share one)."""
    return "nccl" if device == "cuda" and ranks <= torch.cuda.device_count() else "gloo"
