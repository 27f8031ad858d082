"""Data parallelism: every rank holds the whole model and sees its share of every batch (DDP).

With N ranks, shares B_r of the batch B and per-sample losses l_i, one process follows the gradient of

    1/|B| · Σ_i∈B ∇l_i  =  1/N · Σ_r  ( N/|B| · Σ_i∈B_r ∇l_i )

DDP computes the outer mean over ranks; so a rank weighs the sum over its share by N/|B| (`share_weight`), and the
equality is exact also when the ranks do not divide the batch evenly. Source: Li et al., "PyTorch Distributed:
Experiences on Accelerating Data Parallel Training", VLDB 2020.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from labkit.parallel.communication import Communication
from labkit.parallel.decay import by_shape

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch
    from accelerate import Accelerator
    from torch import Tensor, nn

    from labkit.experiment import Experiment
    from labkit.gradients.exchange import CommHook, Counters, GradientReducer
    from labkit.parallel.cut import ShardSpec
    from labkit.parallel.mesh import Mesh
    from labkit.parallel.shared_memory import SharedMemory
    from labkit.workloads.base import Batch, Task


def share_weight(samples: int, global_batch: int, ranks: int) -> float:
    """Factor for the mean loss over `samples` so that the mean over ranks is the mean over the global batch."""
    return samples * ranks / global_batch


class Replicate:
    """The axis `dp_replicate`, applied by `Accelerator.prepare`."""

    @staticmethod
    def handler(experiment: Experiment) -> Any:
        """The keyword handler that Accelerate passes to DistributedDataParallel."""
        from accelerate import DistributedDataParallelKwargs

        # Gradients live in the buckets: no copy in or out. Buffers are united after each update (buffers.py); sent by
        # DDP, those of the first rank would take the place of what the others have seen.
        return DistributedDataParallelKwargs(
            bucket_cap_mb=experiment.gradients.bucket_mb, gradient_as_bucket_view=True, broadcast_buffers=False
        )

    @staticmethod
    def apply(accelerator: Accelerator, model: nn.Module) -> nn.Module:
        """Wrap the model for the ranks of `accelerator`."""
        wrapped: nn.Module = accelerator.prepare(model)
        return wrapped

    @staticmethod
    def communication(model: nn.Module) -> dict[str, float] | None:
        """What DDP's own timers saw: gradient bytes, buckets and exposed time (s) per step; None outside DDP.

        The reducer samples its timers in C++; exposed is the time in which gradients travelled while no gradient was
        being computed.
        """
        read = getattr(model, "_get_ddp_logging_data", None)
        if read is None:
            return None
        data = read()
        hidden = data.get("avg_backward_compute_comm_overlap_time", 0)
        exposed = max(0, data.get("avg_backward_comm_time", 0) - hidden) / 1e9
        sizes = str(data.get("rebuilt_bucket_sizes") or data.get("bucket_sizes") or "")
        return {
            "gradient_bytes": data.get("total_parameter_size_bytes", 0),
            "buckets": len([size for size in sizes.split(",") if size.strip()]),
            "exposed_seconds": exposed,
        }


def deal_out(replicated: Any) -> None:
    """Let a DistributedDataParallel deal its parameters out to buckets now (collective), once and for all.

    Left alone it has one bucket in the first update, and in the second deals all out anew, in the order in which their
    gradients came. Sums over three ranks and more, and everything that a compressor does by bucket, depend on that, so
    a resumed run would begin with other numbers than the run that was never interrupted. Here each run begins with the
    buckets that it ends with, in the reverse order of the parameters: a pass without a model and without gradients.
    """
    import torch

    if replicated.find_unused_parameters or replicated.static_graph:
        return
    trained = [parameter for parameter in replicated.module.parameters() if parameter.requires_grad]
    replicated.reducer.prepare_for_backward([])
    outputs = [parameter.view_as(parameter) for parameter in trained]
    torch.autograd.backward(outputs, [one.new_zeros(()).expand_as(one) for one in outputs])
    for parameter in trained:
        assert parameter.grad is not None
        parameter.grad.zero_()


class ReplicatedModel:
    """The whole model on every rank: the same methods as `labkit.parallel.model.ParallelModel`, on DDP."""

    counted = 1.0
    sharded = ()
    tied: tuple[str, ...] = ()

    def __init__(
        self,
        experiment: Experiment,
        task: Task,
        mesh: Mesh,
        accelerator: Accelerator,
        exchanges: GradientReducer,
        through_ddp: bool = True,
    ) -> None:
        from labkit.parallel import recompute
        from labkit.parallel.expert import weigh_samples

        self.task, self.bare, self.mesh = task, task.model, mesh
        self.stages = {0: task.model}
        self._autocast = accelerator.autocast
        self.holdings: dict[str, ShardSpec] = {}
        if experiment.layout.activation_checkpointing != "none":
            recompute.apply(task.model, experiment.layout.activation_checkpointing)
        self.working = task.model
        """The module that computes the gradients."""
        self.through_ddp = through_ddp
        """Do gradients travel through DDP? Not if an update rule combines what ranks learned in another way."""
        self.wrapped = Replicate.apply(accelerator, task.model) if through_ddp else task.model
        self.averaged_over = experiment.layout.dp_replicate
        weigh_samples(task.model, self.averaged_over / experiment.training.global_batch)
        self.memory: SharedMemory | None = None
        """Where gradients are exchanged, if not in the process group."""
        self.then: Callable[[], None] = lambda: None
        """Called after every update, once the weights are whole."""
        self._exchanges = exchanges
        self._exchange: CommHook | None = None
        self._updates = 0
        """Updates whose gradients have been exchanged."""
        self._steers = exchanges.needs_hook or not experiment.gradients.overlap
        trained = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
        self._gradient_bytes = sum(parameter.numel() * parameter.element_size() for parameter in trained)

    def exchange_through(self, folder: Path | None, timeout_s: float) -> None:
        """Say what gradients go through (collective): memory of this machine if a `folder` to meet in is given."""
        if folder is not None:
            self.share_memory(folder, timeout_s)
        elif self._steers and hasattr(self.wrapped, "register_comm_hook"):
            import torch.distributed as dist

            assert dist.group.WORLD is not None
            self._exchange = self._exchanges.hook_for(dist.group.WORLD)
            self._exchange.register(self.wrapped)
            self._exchange.disabled = True
        if hasattr(self.wrapped, "reducer"):
            deal_out(self.wrapped)
        if self._exchange is not None:
            self._exchange.disabled = False

    def share_memory(self, folder: Path, timeout_s: float) -> None:
        """Exchange gradients through memory of this machine from here on (collective)."""
        from labkit.parallel.shared_memory import SharedMemory

        self.memory = SharedMemory.attach(self.wrapped, folder, timeout_s)

    def optimized(self) -> list[tuple[nn.Parameter, bool]]:
        """What the optimizer works on, and whether it decays."""
        return by_shape(self.bare.parameters())

    def run_pass(self, batch: Batch, weight: float, last: bool, phase: Callable[[str], None]) -> Tensor:
        """Forward and backward; the mean over the ranks is the update's gradient, hence `averaged_over`."""
        from labkit.parallel.weigh import is_nothing, loss_of

        phase("forward")
        with self._autocast():
            output: Tensor = self.wrapped(batch["x"])
        loss = loss_of(self.task, output, batch, counts=not is_nothing(weight))
        phase("backward")
        (loss * weight).backward()
        self._updates += bool(getattr(self.wrapped, "require_backward_grad_sync", True))
        return loss.detach()

    def use(self, working: nn.Module) -> None:
        """Compute gradients with this module instead of the one that is evaluated and saved."""
        self.working = working
        if not self.through_ddp:
            self.wrapped = working

    def no_sync(self) -> AbstractContextManager[Any]:
        """While it is open, passes add up gradients and exchange none."""
        no_sync: Callable[[], AbstractContextManager[Any]] = getattr(self.wrapped, "no_sync", nullcontext)
        return no_sync()

    def grad_norm(self) -> Tensor:
        """The norm of the update's whole gradient."""
        import torch

        return torch.nn.utils.get_total_norm([p.grad for p in self.working.parameters() if p.grad is not None])

    def clip(self, limit: float) -> Tensor:
        """Scale the gradients so that their norm is at most `limit`; returns the norm before."""
        import torch

        return torch.nn.utils.clip_grad_norm_(self.working.parameters(), limit)

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer has stepped. DDP's gradients stay in its buckets: a new one would have to be copied in."""
        if self.through_ddp and self.averaged_over > 1:
            # What no rank has used keeps no gradient, as in one process: zeros would let it decay.
            optimizer.zero_grad(set_to_none=bool(getattr(self.wrapped, "find_unused_parameters", False)))
        else:
            self.working.zero_grad()
        self.then()

    def output(self, x: Tensor) -> Tensor:
        """Output of the model for evaluation, computed as in training."""
        from labkit.parallel.cast import widened

        with self._autocast():
            out: Tensor = self.bare(x)
        return widened(out)

    @property
    def exchange(self) -> str:
        """What gradients go through."""
        if self.averaged_over == 1:
            return "none"
        if not self.through_ddp:
            return "update rule"
        return "shared memory" if self.memory else "process group"

    def counters(self) -> Counters | None:
        """What combining gradients has cost so far; None on one rank.

        Where DDP's own reducer or shared memory are at work the bytes are those of the formula.
        """
        from labkit.gradients.cost import all_reduce_bytes
        from labkit.gradients.exchange import Counters

        if not hasattr(self.wrapped, "register_comm_hook"):
            return None
        if self._exchange is not None:
            return self._exchange.counters()
        sent = self._updates * all_reduce_bytes(self._gradient_bytes, self.averaged_over)
        return Counters(sent, self.memory.seconds if self.memory else math.nan, 0.0, sent)

    def communication(self) -> Communication | None:
        """What is sent per update; None on one rank."""
        measured, counted = Replicate.communication(self.wrapped), self.counters()
        if measured is None or counted is None:
            return None
        updates = max(1, self._updates)
        if not math.isnan(counted.exposed_seconds):
            measured["exposed_seconds"] = counted.exposed_seconds / updates
        wire = counted.bytes / updates
        axis = {
            "calls": measured["buckets"],
            "bytes": measured["gradient_bytes"],
            "wire_bytes": wire,
            "exposed_seconds": measured["exposed_seconds"],
        }
        return Communication(wire, measured["exposed_seconds"], {"dp_replicate": axis})

    def train(self, mode: bool = True) -> None:
        self.bare.train(mode)
