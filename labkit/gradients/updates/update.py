"""When ranks combine what they learned: what every update rule is made of.

Two kinds of loop exist. In *rounds* every rank takes its share of every update (synchronous, local, delayed); in
*tickets* (tickets.py) ranks draw one piece of work after the other and nobody waits for the slowest.

All rules are told of the same moments of an update:

    passes forward and backward → before_update → optimizer → after_update

and of the moments at which one set of weights has to stand for all ranks: `averaged_weights` (an evaluation, which leaves the
training as it is) and `average_replicas` (a checkpoint: from here on the ranks really go on from one state, so that a
resumed run repeats what the first one did).

A rule's file imports torch inside its methods only: forms read its options.
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


AVERAGED = "the stop averaged weights that each rank had to itself, and other ranks cannot go on with those"
"""Why a run of a rule that `replicas_diverge` does not go on exactly from the checkpoint of a stopped one."""


@dataclass(frozen=True)
class UpdateContext:
    """What an update rule works with on its rank."""

    experiment: Experiment
    options: Any
    """The options of the rule."""
    model: nn.Module
    optimizer: torch.optim.Optimizer
    comm: Communicator
    """To all ranks."""
    steps: int
    """Updates of the whole run."""
    lr_at: Callable[[int], float]
    """Learning rate of update t (counted from 0)."""
    folder: Path
    """A private local folder of the run."""
    timeout_s: float
    """How long a rank waits for another one."""
    irregular: bool
    """May a pass leave parameters without a gradient?"""
    next_sync_step: Callable[[int], int]
    """After how many updates, as known when update t begins, the ranks stand still: for an evaluation, a checkpoint, a
    stop or the end."""


class UpdateRule:
    """Base of the rules in which every rank takes part in every update."""

    uses_ddp: ClassVar[bool] = False
    """Do gradients travel through DistributedDataParallel?"""
    one_batch: ClassVar[bool] = False
    """Do all ranks work on one batch in each update, of which every gradient is a part?"""
    uses_work_queue: bool = False
    """Do ranks draw tickets?"""
    max_step_skew: int = 0
    """By how many updates another rank may be ahead of rank 0 when it must hear of a stop: `Board.should_stop`.

    Whatever makes ranks wait for each other bounds it; a stop comes so many updates later.
    """
    replicas_diverge: bool = False
    """Do ranks hold weights of their own between updates?"""
    steps_in_flight: int = 0
    """Updates that have begun before the one that ends next, on which a trace has to look back."""

    def __init__(self, context: UpdateContext) -> None:
        self.context, self.options, self.comm = context, context.options, context.comm
        self.model, self.optimizer = context.model, context.optimizer

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Why this rule cannot run here."""
        return replicas_only(experiment)

    def lr_scale(self, step: int) -> float:
        """Factor on this rank's learning rate in update `step`."""
        return 1.0

    def training_module(self) -> nn.Module:
        """The module that computes gradients on this rank."""
        return self.model

    def wrap_dataloader(self, model: Any, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches of this rank, one a pass, in order; a rule may look ahead in them. `model`: the rank's own."""
        return batches

    def forward_backward(self, model: Any, last: bool, step: int) -> AbstractContextManager[Any]:
        """Around one pass forward and backward of update `step`; `last`: of this update. `model`: the rank's own."""
        return nullcontext()

    def before_update(self, step: int) -> None:
        """The gradients of update `step` (counted from 0) are there; the optimizer comes next."""

    def after_update(self, step: int) -> int | None:
        """The optimizer has stepped. Returns the staleness of the gradient it used, in updates, if that is measured."""
        return None

    def averaged_weights(self) -> AbstractContextManager[None]:
        """While it is open (collective) the model holds the weights by which the run is judged: the ranks' mean."""
        from labkit.gradients.updates.average import averaged_replicas

        return averaged_replicas(self.model, self.comm)

    def average_replicas(self, step: int) -> None:
        """All ranks go on from one state (collective): the mean of weights, buffers and optimizer moments."""
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
        """What a checkpoint keeps beside weights and moments, equal on all ranks after `average_replicas`."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from there; called after the weights have been restored, with nothing in it for a new run."""

    def local_state(self) -> dict[str, Tensor]:
        """What a checkpoint of a stopped run keeps of this rank alone, beside its weights and moments (collective)."""
        return {}

    def load_local_state(self, state: dict[str, Tensor]) -> None:
        """Go on from there: the same ranks; called after `load` and after the weights of this rank are in place."""

    @classmethod
    def inexact_resume(cls, options: Any, unscheduled: bool, kept: bool) -> str:
        """Why a run that goes on from a checkpoint differs from one that was never interrupted; empty if it does not.

        `unscheduled`: the checkpoint was written because of a stop; `kept`: each rank goes on with its own weights.
        """
        return ""

    def close(self) -> None:
        """The training is over (collective)."""

    # -- what it cost -------------------------------------------------------------------------------------------------

    formula_bytes = 0
    """What the formula of the rule says of the bytes that this rank has sent so far."""

    @property
    def comms(self) -> tuple[Communicator, ...]:
        """All groups that it talks in."""
        return (self.comm,)

    def counters(self) -> Counters | None:
        """So far, evaluations and checkpoints included; None where only gradients travel, which count themselves."""
        from labkit.gradients.exchange import Counters

        waited = sum(comm.seconds for comm in self.comms)
        return Counters(sum(comm.sent for comm in self.comms), waited, 0.0, self.formula_bytes)


def replicas_only(experiment: Experiment) -> Iterator[Problem]:
    """Rules that let ranks hold different weights know whole models only, and gradients as they are."""
    from labkit.experiment.problem import Problem

    layout, update = experiment.layout, experiment.gradients.update.method
    if layout.world_size != layout.dp_replicate:
        reason = f"{update} needs whole models on all ranks (layout.dp_replicate alone), the layout is {layout}"
        yield Problem("gradients.update.method", reason, "synchronous")
    if layout.world_size == 1:
        yield Problem("gradients.update.method", f"{update} needs more than one rank", "synchronous")
    if experiment.launch.isolated:
        yield Problem(
            "gradients.update.method", f"isolated ranks never talk, {update} has nothing to do", "synchronous"
        )
    if experiment.gradients.compression.method != "none":
        reason = f"{update} sends no gradients through a compressor"
        yield Problem("gradients.compression.method", reason, "none")
