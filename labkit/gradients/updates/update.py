"""The base class of update rules, which decide when ranks combine what they have learned.

There are two kinds of training loop. In *rounds* every rank computes its share of every optimizer step (synchronous,
local, delayed); with a *work queue* (tickets.py) ranks take one work item after the other, and nobody waits for the
slowest.

The trainer calls every rule at the same points of an optimizer step,

    forward and backward passes → before_update → optimizer → after_update

and wherever one set of weights has to represent all ranks: `averaged_weights` for an evaluation, which does not change
the training, and `average_replicas` for a checkpoint, after which all ranks continue from one state, so that a resumed
run repeats what the first one did.

The file of a rule imports torch only inside its methods, because forms read its options.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from labkit.experiment import Experiment
    from labkit.experiment.machine import Machine
    from labkit.experiment.problem import Problem
    from labkit.gradients.exchange import Counters
    from labkit.gradients.wire import Communicator


AVERAGED = "the stop averaged weights that differed between ranks, and only the same ranks can resume with their own"
"""Why a resume from the checkpoint of a stopped run is not exact if the rule lets replicas diverge."""


@dataclass(frozen=True)
class UpdateContext:
    """Everything that an update rule needs on its rank."""

    experiment: Experiment
    options: Any
    """The options of the rule."""
    model: nn.Module
    optimizer: torch.optim.Optimizer
    comm: Communicator
    """Communicator of all ranks."""
    steps: int
    """Number of optimizer steps of the whole run."""
    lr_at: Callable[[int], float]
    """Learning rate of optimizer step t (counted from 0)."""
    folder: Path
    """Private local folder of the run."""
    timeout_s: float
    """Seconds for which a rank waits for another one."""
    irregular: bool
    """Whether a pass may leave parameters without a gradient."""
    next_sync_step: Callable[[int], int]
    """Given step t, the next step at which all ranks synchronise (evaluation, checkpoint, stop or end)."""


class UpdateRule:
    """Base class of rules; by default every rank takes part in every optimizer step."""

    uses_ddp: ClassVar[bool] = False
    """Whether gradients are reduced by DistributedDataParallel."""
    one_batch: ClassVar[bool] = False
    """Whether in each step all ranks compute parts of the gradient of one batch."""
    masks_reach_optimizer: ClassVar[bool] = False
    """Whether every optimizer step uses gradients from which sparsity has removed those of zero weights."""
    uses_work_queue: bool = False
    """Whether ranks take their work from a work queue (tickets.py)."""
    max_step_skew: int = 0
    """Maximum number of steps by which a rank may be ahead of rank 0 (see `Board.should_stop`).

    It is bounded by whatever makes ranks wait for each other; a stop takes effect that many steps later.
    """
    replicas_diverge: bool = False
    """Whether ranks hold different weights between optimizer steps."""
    steps_in_flight: int = 0
    """Number of steps that have started before the one that ends next; a trace has to begin that much earlier."""

    def __init__(self, context: UpdateContext) -> None:
        self.context, self.options, self.comm = context, context.options, context.comm
        self.model, self.optimizer = context.model, context.optimizer

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield the reasons why this rule cannot run here."""
        return replicas_only(experiment)

    def lr_scale(self, step: int) -> float:
        """Return the factor on this rank's learning rate in step `step`."""
        return 1.0

    def training_module(self) -> nn.Module:
        """Return the module that computes gradients on this rank."""
        return self.model

    def wrap_dataloader(self, model: Any, batches: Iterator[Any]) -> Iterator[Any]:
        """Return an iterator over the batches of this rank, one per pass; a rule may look ahead in it.

        `model` is the parallel model of this rank.
        """
        return batches

    def forward_backward(self, model: Any, last: bool, step: int) -> AbstractContextManager[Any]:
        """Return a context manager around one forward and backward pass of step `step`.

        `model` is the parallel model of this rank; `last` marks the last pass of the step.
        """
        return nullcontext()

    def before_update(self, step: int) -> None:
        """Do what is due between the last backward pass of step `step` (counted from 0) and the optimizer."""

    def after_update(self, step: int) -> int | None:
        """Do what is due after the optimizer; return the staleness of its gradient in steps, None if not measured."""
        return None

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Return a context manager in which the model holds the mean weights of all ranks, to evaluate (collective)."""
        from labkit.gradients.updates.average import averaged_replicas

        return averaged_replicas(self.model, self.comm)

    def average_replicas(self, step: int) -> None:
        """Replace weights, buffers and optimizer moments by their mean over all ranks (collective)."""
        from labkit.gradients.updates.average import (
            average,
            broadcast_from_first,
            integer_buffers,
            optimizer_moments,
            weights_and_buffers,
        )

        average([*weights_and_buffers(self.model), *optimizer_moments(self.optimizer)], self.comm)
        broadcast_from_first(integer_buffers(self.model), self.comm)

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint stores besides weights and moments; equal on all ranks after `average_replicas`."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned; called after the weights were restored, with an empty dict for a new run."""

    def local_state(self) -> dict[str, Tensor]:
        """Return what a stopped run stores for this rank alone besides its weights and moments (collective)."""
        return {}

    def load_local_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `local_state` returned on this rank; called after `load` and after its weights were restored."""

    @classmethod
    def inexact_resume(cls, options: Any, unscheduled: bool, restores_local_state: bool) -> str:
        """Return why a resumed run differs from one that was never interrupted; empty if it does not.

        `unscheduled`: the checkpoint was written because of a stop. `restores_local_state`: each rank resumes with its
        own weights.
        """
        return ""

    def close(self) -> None:
        """Finish what is in flight at the end of the training (collective)."""

    # -- what it cost -------------------------------------------------------------------------------------------------

    formula_bytes = 0
    """Bytes that this rank has sent so far, by the formula of the rule."""

    @property
    def comms(self) -> tuple[Communicator, ...]:
        """All communicators that this rule uses."""
        return (self.comm,)

    def counters(self) -> Counters | None:
        """Return the costs so far, evaluations and checkpoints included; None if the model counts them itself."""
        from labkit.gradients.exchange import Counters

        waited = sum(comm.wait_seconds for comm in self.comms)
        return Counters(sum(comm.sent_bytes for comm in self.comms), waited, 0.0, self.formula_bytes)


def replicas_only(experiment: Experiment) -> Iterator[Problem]:
    """Yield the constraints of rules with diverging replicas: plain data parallelism and no gradient compression."""
    from labkit.experiment.problem import Problem

    layout, update = experiment.layout, experiment.gradients.update.method
    if layout.world_size != layout.dp_replicate:
        reason = f"{update} needs a full model on every rank (layout.dp_replicate alone), the layout is {layout}"
        yield Problem("gradients.update.method", reason, "synchronous")
    if layout.world_size == 1:
        yield Problem("gradients.update.method", f"{update} needs more than one rank", "synchronous")
    if experiment.launch.isolated:
        yield Problem(
            "gradients.update.method", f"isolated ranks exchange nothing, so {update} has nothing to do", "synchronous"
        )
    if experiment.gradients.compression.method != "none":
        reason = f"{update} sends no gradients through a compressor"
        yield Problem("gradients.compression.method", reason, "none")


def recomputes_nothing(experiment: Experiment) -> Iterator[Problem]:
    """Yield the constraint of rules under which weights change during a pass: activations are not recomputed.

    The recomputation would use other weights than the forward pass: wrong gradients, and with experts, which then get
    other tokens, tensors of other shapes.
    """
    from labkit.experiment.problem import Problem

    if experiment.layout.activation_checkpointing != "none":
        update = experiment.gradients.update.method
        reason = f"under {update} weights may change between the forward pass and the recomputation of its activations"
        yield Problem("layout.activation_checkpointing", reason, "none")
