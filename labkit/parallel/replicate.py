"""Data parallelism: every rank holds the whole model and computes on its share of every batch (DDP).

With N ranks, shares B_r of the batch B and per-sample losses l_i, one process would follow the gradient

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
from labkit.parallel.decay import with_decay_flags

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
    """Return the factor for the mean loss over `samples` by which the mean over ranks is that over the global batch."""
    return samples * ranks / global_batch


class Replicate:
    """The axis `dp_replicate`, applied by `Accelerator.prepare`."""

    @staticmethod
    def ddp_handler(experiment: Experiment) -> Any:
        """Return the keyword handler that Accelerate passes to DistributedDataParallel."""
        from accelerate import DistributedDataParallelKwargs

        # Gradients are views of the buckets: no copy in or out. Buffers are averaged after each update (buffers.py); if
        # DDP broadcast them, those of the first rank would replace what the others have accumulated.
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
        """Return what DDP's own timers saw: gradient bytes, buckets and exposed time (s) per step; None outside DDP.

        The reducer samples its timers in C++. Exposed is the time in which gradients were reduced while no gradient was
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


def assign_buckets(replicated: Any) -> None:
    """Make a DistributedDataParallel assign its parameters to buckets now, for the whole run (collective).

    By default it has one bucket in the first update, and in the second it assigns all parameters anew, in the order in
    which their gradients were computed. Sums over three ranks and more, and everything that a compressor does per
    bucket, depend on that, so a resumed run would begin with other numbers than a run that was never interrupted. Here
    each run begins with the buckets that it ends with, in the reverse order of the parameters: this runs a backward
    pass with zero gradients and without the model.
    """
    import torch

    if replicated.find_unused_parameters or replicated.static_graph:
        return
    trained = [parameter for parameter in replicated.module.parameters() if parameter.requires_grad]
    replicated.reducer.prepare_for_backward([])
    outputs = [parameter.view_as(parameter) for parameter in trained]
    torch.autograd.backward(outputs, [output.new_zeros(()).expand_as(output) for output in outputs])
    for parameter in trained:
        assert parameter.grad is not None
        parameter.grad.zero_()


class ReplicatedModel:
    """The whole model on every rank: the same methods as `labkit.parallel.model.ParallelModel`, on DDP."""

    metric_weight = 1.0
    """Weight of this rank's losses and metrics."""
    sharded = ()
    """Always empty: no buckets are sharded."""
    tied: tuple[str, ...] = ()
    """Always empty: no weight is held by several stages."""

    def __init__(
        self,
        experiment: Experiment,
        task: Task,
        mesh: Mesh,
        accelerator: Accelerator,
        reducer: GradientReducer,
        through_ddp: bool = True,
    ) -> None:
        from labkit.parallel import recompute
        from labkit.parallel.expert import set_sample_weight

        self.task, self.unwrapped, self.mesh = task, task.model, mesh
        self.stages = {0: task.model}
        self._autocast = accelerator.autocast
        self.shard_specs: dict[str, ShardSpec] = {}
        if experiment.layout.activation_checkpointing != "none":
            recompute.apply(task.model, experiment.layout.activation_checkpointing)
        self.training_module = task.model
        """The module that computes the gradients."""
        self.through_ddp = through_ddp
        """True if DDP reduces the gradients; False if an update rule combines the replicas in another way."""
        self.wrapped = Replicate.apply(accelerator, task.model) if through_ddp else task.model
        self.averaged_over = experiment.layout.dp_replicate
        set_sample_weight(task.model, self.averaged_over / experiment.training.global_batch)
        self.memory: SharedMemory | None = None
        """The shared memory in which gradients are reduced; None for the process group."""
        self.on_weights_updated: Callable[[], None] = lambda: None
        """Called after every update, once all ranks have the new weights."""
        self._reducer = reducer
        self._comm_hook: CommHook | None = None
        self._updates = 0
        """Number of updates whose gradients have been reduced."""
        self._needs_hook = reducer.needs_hook or not experiment.gradients.overlap
        trained = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
        self._gradient_bytes = sum(parameter.numel() * parameter.element_size() for parameter in trained)

    def set_up_exchange(self, folder: Path | None, timeout_s: float) -> None:
        """Choose how gradients are reduced (collective): in shared memory if a `folder` to connect in is given."""
        if folder is not None:
            self.use_shared_memory(folder, timeout_s)
        elif self._needs_hook and hasattr(self.wrapped, "register_comm_hook"):
            import torch.distributed as dist

            assert dist.group.WORLD is not None
            self._comm_hook = self._reducer.hook_for(dist.group.WORLD)
            self._comm_hook.register(self.wrapped)
            self._comm_hook.disabled = True
        if hasattr(self.wrapped, "reducer"):
            assign_buckets(self.wrapped)
        if self._comm_hook is not None:
            self._comm_hook.disabled = False

    def use_shared_memory(self, folder: Path, timeout_s: float) -> None:
        """Reduce gradients in memory shared by the ranks of this machine from now on (collective)."""
        from labkit.parallel.shared_memory import SharedMemory

        self.memory = SharedMemory.attach(self.wrapped, folder, timeout_s)

    def optimizer_parameters(self) -> list[tuple[nn.Parameter, bool]]:
        """Return the parameters that the optimizer updates, each with whether weight decay applies to it."""
        return with_decay_flags(self.unwrapped.parameters())

    def run_pass(self, batch: Batch, weight: float, last: bool, phase: Callable[[str], None]) -> Tensor:
        """Run forward and backward over `batch` and return its mean loss.

        `weight`: share of these samples in the update, times `averaged_over`, because DDP averages over the ranks.
        `phase` is called with "forward" and "backward" as each begins.
        """
        from labkit.parallel.weigh import is_zero, loss_of

        phase("forward")
        with self._autocast():
            output: Tensor = self.wrapped(batch["x"])
        loss = loss_of(self.task, output, batch, counts=not is_zero(weight))
        phase("backward")
        (loss * weight).backward()
        self._updates += bool(getattr(self.wrapped, "require_backward_grad_sync", True))
        return loss.detach()

    def set_training_module(self, module: nn.Module) -> None:
        """Compute gradients with this module instead of the one that is evaluated and saved."""
        self.training_module = module
        if not self.through_ddp:
            self.wrapped = module

    def no_sync(self) -> AbstractContextManager[Any]:
        """Context manager in which passes accumulate gradients without reducing them."""
        no_sync: Callable[[], AbstractContextManager[Any]] = getattr(self.wrapped, "no_sync", nullcontext)
        return no_sync()

    def grad_norm(self) -> Tensor:
        """Return the norm of the update's gradient over all parameters."""
        import torch

        return torch.nn.utils.get_total_norm([p.grad for p in self.training_module.parameters() if p.grad is not None])

    def clip(self, limit: float) -> Tensor:
        """Scale the gradients so that their norm is at most `limit`; return the norm before."""
        import torch

        return torch.nn.utils.clip_grad_norm_(self.training_module.parameters(), limit)

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Reset the gradients after an optimizer step. DDP's stay in its buckets: new ones would be copied in."""
        if self.through_ddp and self.averaged_over > 1:
            # A parameter that no rank has used gets no gradient, as in one process: with zeros it would decay.
            optimizer.zero_grad(set_to_none=bool(getattr(self.wrapped, "find_unused_parameters", False)))
        else:
            self.training_module.zero_grad()
        self.on_weights_updated()

    def complete_update(self) -> None:
        """Do nothing: every rank has all weights as soon as its optimizer has stepped."""

    def output(self, x: Tensor) -> Tensor:
        """Return the output of the model for evaluation, computed as in training, in at least float32."""
        from labkit.parallel.cast import widen

        with self._autocast():
            out: Tensor = self.unwrapped(x)
        return widen(out)

    @property
    def exchange(self) -> str:
        """What reduces the gradients: "none", "update rule", "shared memory" or "process group"."""
        if self.averaged_over == 1:
            return "none"
        if not self.through_ddp:
            return "update rule"
        return "shared memory" if self.memory else "process group"

    def counters(self) -> Counters | None:
        """Return the cost of reducing gradients so far; None without DDP.

        If DDP's own reducer or shared memory reduce them, the bytes are those of the formula.
        """
        from labkit.gradients.cost import all_reduce_bytes
        from labkit.gradients.exchange import Counters

        if not hasattr(self.wrapped, "register_comm_hook"):
            return None
        if self._comm_hook is not None:
            return self._comm_hook.counters()
        sent = self._updates * all_reduce_bytes(self._gradient_bytes, self.averaged_over)
        return Counters(sent, self.memory.seconds if self.memory else math.nan, 0.0, sent)

    def communication(self) -> Communication | None:
        """Return the communication per update; None without DDP."""
        measured, counters = Replicate.communication(self.wrapped), self.counters()
        if measured is None or counters is None:
            return None
        updates = max(1, self._updates)
        if not math.isnan(counters.exposed_seconds):
            measured["exposed_seconds"] = counters.exposed_seconds / updates
        wire = counters.bytes / updates
        axis = {
            "calls": measured["buckets"],
            "bytes": measured["gradient_bytes"],
            "wire_bytes": wire,
            "exposed_seconds": measured["exposed_seconds"],
        }
        return Communication(wire, measured["exposed_seconds"], {"dp_replicate": axis})

    def train(self, mode: bool = True) -> None:
        self.unwrapped.train(mode)
