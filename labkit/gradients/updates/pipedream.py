"""PipeDream: an asynchronous pipeline with weight stashing (Narayanan et al., SOSP 2019).

A minibatch of `training.global_batch` samples is one update, and no stage waits until an update is over everywhere:
while its gradient is on the way back, the stages begin the next ones. Stage s of S steps with gradients that are
S-1-s updates stale; they belong to the weights of their own forward pass, of which it keeps S-1-s versions. With
`stash` off the backward pass finds newer weights than the forward pass had: what comes out is no gradient of anything.

PipeDream itself is `predict` = 0. Beyond it, minibatches may see weights that are predicted for the update in which
their gradient is used (Kosson et al., "Pipelined Backpropagation at Scale", 2021, arXiv:2003.11666).

Evaluations, checkpoints, stops and the end find the pipeline empty, and it fills again afterwards: the first S-1
updates then are less stale. A resumed run goes on exactly, unless it was a stop that emptied the pipeline. What the
ranks do stands in labkit/parallel/asynchronous.py; this rule tells them when.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from pydantic import Field

from labkit.experiment.problem import Problem
from labkit.experiment.registry import Options as BaseOptions
from labkit.gradients.updates.update import UpdateRule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from labkit.experiment import Experiment
    from labkit.experiment.machine import Machine
    from labkit.gradients.updates.update import UpdateContext

METHOD = "gradients.update.method"


class PipeDream(UpdateRule):
    """Stages that do not wait for each other's updates."""

    class Options(BaseOptions):
        stash: bool = True
        """Keep the weights of a minibatch's forward pass for its backward pass; off shows what that is for."""
        predict: float = Field(default=2.0, ge=0, le=10)
        """With stashing: how far ahead weights are predicted, in multiples of the staleness; 0 is PipeDream itself."""

    def __init__(self, context: UpdateContext) -> None:
        super().__init__(context)
        self.max_step_skew = self.steps_in_flight = context.experiment.layout.pp
        self._pipeline: Any = None

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Why it cannot run here."""
        from labkit.experiment.layout import V_SHAPED

        layout, gradients, workload = experiment.layout, experiment.gradients, experiment.workload.options
        if layout.pp == 1 or layout.world_size != layout.pp:
            reason = f"pipedream is a pipeline and nothing else (layout.pp alone above 1), the layout is {layout}"
            yield Problem(METHOD, reason, "synchronous")
        if layout.schedule in V_SHAPED:
            reason = (
                f"{layout.schedule} folds the pipeline, pipedream runs one stage per rank in the order of the chain"
            )
            yield Problem("layout.schedule", reason, "1f1b")
        if layout.stages_per_rank != 1:
            yield Problem("layout.stages_per_rank", "pipedream runs one stage per rank", 1)
        if gradients.accumulation != 1:
            yield Problem("gradients.accumulation", "pipedream makes an update of every minibatch, in one pass", 1)
        if gradients.compression.method != "none":
            reason = "stages of pipedream exchange activations and their gradients, not those of weights"
            yield Problem("gradients.compression.method", reason, "none")
        if experiment.launch.isolated:
            yield Problem(METHOD, "isolated ranks never talk, and stages have to", "synchronous")
        if experiment.training.gradient_norm:
            reason = "the norm of the whole gradient would make all stages wait for each other in every update"
            yield Problem("training.gradient_norm", reason, "false")
        tied = {"tied": workload.get("tied")}
        tied["transformers_config"] = (workload.get("transformers_config") or {}).get("tie_word_embeddings")
        for field in (name for name, value in tied.items() if value):
            reason = "a weight on two stages would make them wait for each other in every update"
            yield Problem(f"workload.{field}", reason, "false" if field == "tied" else None)

    @staticmethod
    def warnings(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """What it does not ask for, and what it does otherwise."""
        layout = experiment.layout
        if experiment.optimizer.clip_norm is not None:
            reason = (
                f"each stage clips its own part of the gradient to 1/√{layout.pp} of it, so that none waits for the "
                "others: the bound holds, but parts may be scaled differently"
            )
            yield Problem("optimizer.clip_norm", reason)
        for name in ("schedule", "microbatches"):
            if getattr(layout, name) != type(layout).model_fields[name].default:
                yield Problem(f"layout.{name}", "has no effect: pipedream's pipeline runs on whole minibatches")

    def wrap_dataloader(self, model: Any, batches: Iterator[Any]) -> Iterator[Any]:
        """The first stage begins minibatches before their update."""
        self._pipeline = model.pipeline
        return self._pipeline.supply(batches)

    def forward_backward(self, model: Any, last: bool, step: int) -> AbstractContextManager[Any]:
        """Tell the stage how far it may run ahead."""
        self._pipeline.begin(step, self.context.next_sync_step(step))
        return nullcontext()

    def before_update(self, step: int) -> None:
        """Stash the weights."""
        self._pipeline.keep()

    def after_update(self, step: int) -> int | None:
        """Updates between the forward pass of this minibatch and its gradient, on this stage."""
        return self._pipeline.updated()

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Every weight is on one rank, and the pipeline is empty."""
        return nullcontext()

    def average_replicas(self, step: int) -> None:
        """Every weight is on one rank, and the pipeline is empty."""

    @classmethod
    def inexact_resume(cls, options: Any, unscheduled: bool, kept: bool) -> str:
        """A pipeline that a stop has emptied fills again, so some updates are less stale than they would have been."""
        return "the stop emptied the pipeline, which a run that goes on has to fill again" if unscheduled else ""

    def close(self) -> None:
        """Wait for all stages: the last one is done first, and the others still read what it has sent."""
        import torch.distributed as dist

        self._pipeline.finish()
        dist.barrier(self.comm.group)
