"""The runtime of one rank: threads, device, process group, Accelerator.

Accelerate keeps the process state, wraps the model, gathers and saves. The process group is made here, because the
rendezvous is a file in a private directory: no port to collide on, and nothing listens beyond loopback.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

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
"""Collectives give up this much later than the supervisor, which can name the rank at fault."""


@dataclass(frozen=True)
class Runtime:
    """Who this rank is and what it works with."""

    rank: int
    """Rank in the run, also where ranks are isolated."""
    ranks: int
    """All ranks of the run."""
    device: torch.device
    dtype: torch.dtype
    accelerator: Accelerator
    precision: Any
    isolated: bool
    mesh: Mesh
    folder: Path
    """A private local folder in which the ranks of this run meet."""
    timeout_s: float
    """How long a rank waits for another one."""

    @classmethod
    def start(cls, experiment: Experiment, rank: int, rendezvous: str) -> Runtime:
        """Join the other ranks. Blocks until all have joined."""
        launch, ranks = experiment.launch, experiment.layout.world_size
        timeout_s = SLOW_FACTOR * launch.timeout_s + PATIENCE_S
        torch.set_num_threads(launch.threads_per_rank)
        alone = ranks == 1 or launch.isolated
        cpu = launch.device == "cpu"
        if not cpu:
            os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # the order in which nvidia-smi names them
            if not torch.cuda.device_count():
                raise RuntimeError(
                    f"torch {torch.__version__} finds no GPU that it can use, although the driver shows one: install a "
                    "build of torch for the CUDA version of this driver (labkit doctor shows both)"
                )
            device = torch.device("cuda", rank % torch.cuda.device_count())
            torch.cuda.set_device(device)
            os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
            if not alone:  # Accelerate takes the local rank for the index of the GPU; ranks may share one here
                os.environ["LOCAL_RANK"] = str(device.index)
        if not alone:
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
            gradient_accumulation_steps=1,  # the loop weighs its passes itself
            kwargs_handlers=[Replicate.ddp_handler(experiment), *precision.handlers()],
            step_scheduler_with_optimizer=False,
        )
        # Silently training N separate models is the worst that can happen: several launchers do it.
        expected = 1 if alone else ranks
        if accelerator.num_processes != expected:
            raise RuntimeError(f"{accelerator.num_processes} processes have met, {expected} were expected")
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

    def place(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Move a batch to the device; what goes into the model also to the number format of the run.

        Everything else, targets above all, keeps at least float32: losses are computed in it, and the years 1993 to
        2007 are five numbers in bfloat16 (issue 11, B 23).
        """
        wide = at_least_float32(self.dtype)
        return {
            name: place_tensor(tensor, self.device, self.dtype if name == "x" else wide)
            for name, tensor in batch.items()
        }

    def product_type(self) -> torch.dtype:
        """The type in which a product of matrices really comes out here."""
        one = torch.ones(1, 1, dtype=self.dtype, device=self.device)
        with self.accelerator.autocast():
            return (one @ one).dtype

    def seed(self, value: int) -> None:
        """Seed what draws random numbers here: torch on this device, numpy, and Python's `random`."""
        seed_generators(value)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(value)

    def expect_gaps(self, experiment: Experiment) -> Experiment:
        """Passes may leave parameters without a gradient: what exchanges gradients must not wait for them.

        DDP looks at the graph of each pass; buckets leave when a pass is over, in one order on all ranks. Returns the
        experiment that the model is made from.
        """
        ddp_handler = self.accelerator.ddp_handler
        if ddp_handler is not None:
            ddp_handler.find_unused_parameters = True
        return experiment.set({"gradients.overlap": False}) if self.spread else experiment

    def add_up(self, sums: dict[str, float]) -> dict[str, float]:
        """Sum numbers over all ranks; every rank gets the result. All ranks name the same keys."""
        if self.accelerator.num_processes == 1:
            return sums
        if self.mesh.size("pp") > 1:  # only the last stage has seen a result
            names: list[Any] = [sorted(sums)]
            dist.broadcast_object_list(names, self.mesh.first_rank_at(pp=pp_rank_of_last_stage(self.mesh.layout)))
            sums = dict.fromkeys(names[0], 0.0) | sums
        keys = sorted(sums)
        total = torch.tensor([sums[key] for key in keys], dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return dict(zip(keys, total.tolist(), strict=True))

    @property
    def spread(self) -> bool:
        """One copy of the model lies on more than one rank."""
        return self.ranks > self.mesh.layout.dp_replicate

    def meet(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def end(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def backend(device: str, ranks: int) -> str:
    """NCCL where every rank has a GPU of its own; gloo on CPUs and where ranks share a GPU (NCCL refuses that)."""
    return "nccl" if device == "cuda" and ranks <= torch.cuda.device_count() else "gloo"
