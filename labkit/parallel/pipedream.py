"""PipeDream: an asynchronous pipeline with weight stashing (Narayanan et al., SOSP 2019).

A minibatch of `training.global_batch` samples makes one optimizer step, and no stage waits until a step is over
everywhere: while its gradient is on the way back, the stages start the next minibatches. Stage s of S steps with
gradients that are S-1-s steps stale; they belong to the weights of their own forward pass, of which it keeps S-1-s
versions. With `layout.weight_stashing` off the backward pass uses newer weights than the forward pass: its result is
not the gradient of any function.

PipeDream itself has `layout.weight_prediction` = 0. Otherwise minibatches use weights that are predicted for the step
in which their gradient is applied (Kosson et al., "Pipelined Backpropagation at Scale", 2021, arXiv:2003.11666).

The pipeline is empty at evaluations, checkpoints, stops and the end, and fills again afterwards: the first S-1 steps
are then less stale. A resumed run is exact unless a stop emptied the pipeline. labkit/parallel/asynchronous.py has the
work of the ranks; the update rule here, which `layout.schedule` brings, decides when it is done.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from labkit.experiment.problem import Problem
from labkit.gradients.updates.update import UpdateRule
from labkit.parallel.schedule import schedule_problems

if TYPE_CHECKING:
    from collections.abc import Iterator

    from labkit.experiment import Experiment
    from labkit.experiment.machine import Machine
    from labkit.gradients.updates.update import UpdateContext


class PipeDream(UpdateRule):
    """Runs an asynchronous pipeline, whose stages do not wait for each other's optimizer steps."""

    def __init__(self, context: UpdateContext) -> None:
        super().__init__(context)
        self.max_step_skew = self.steps_in_flight = context.experiment.layout.pp
        self._pipeline: Any = None

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield the reasons why it cannot run here.

        Without a pipeline it is refused too, unlike a synchronous schedule: it would change what is computed.
        """
        layout, gradients, workload = experiment.layout, experiment.gradients, experiment.workload.options
        if layout.pp == 1 or layout.world_size != layout.pp:
            reason = f"pipedream is a pipeline and nothing else (layout.pp alone above 1), the layout is {layout}"
            yield Problem("layout.schedule", reason, "1f1b")
        yield from schedule_problems(layout)
        if gradients.accumulation != 1:
            yield Problem("gradients.accumulation", "pipedream makes an update of every minibatch, in one pass", 1)
        if gradients.compression.method != "none":
            reason = "stages of pipedream exchange activations and their gradients, not those of weights"
            yield Problem("gradients.compression.method", reason, "none")
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
        """Yield the settings that have a different effect."""
        layout = experiment.layout
        if experiment.optimizer.clip_norm is not None:
            reason = (
                f"each stage clips its own part of the gradient to 1/√{layout.pp} of it, so that none waits for the "
                "others: the bound holds, but parts may be scaled differently"
            )
            yield Problem("optimizer.clip_norm", reason)

    def wrap_dataloader(self, model: Any, batches: Iterator[Any]) -> Iterator[Any]:
        """Return an iterator over batches that the pipeline wraps: its first stage looks ahead."""
        self._pipeline = model.pipeline
        return self._pipeline.wrap_dataloader(batches)

    def forward_backward(self, model: Any, last: bool, step: int) -> AbstractContextManager[Any]:
        """Tell the pipeline which step begins and how far it may run ahead; return a context that does nothing."""
        self._pipeline.begin_update(step, self.context.next_sync_step(step))
        return nullcontext()

    def before_update(self, step: int) -> None:
        """Stash the weights for minibatches in flight."""
        self._pipeline.stash_weights()

    def after_update(self, step: int) -> int | None:
        """Return the staleness: steps of this stage between the forward pass of the minibatch and its gradient."""
        return self._pipeline.finish_update()

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Return a context manager that does nothing: every weight is on one rank, and the pipeline is empty."""
        return nullcontext()

    def average_replicas(self, step: int) -> None:
        """Do nothing: every weight is on one rank, and the pipeline is empty."""

    @classmethod
    def inexact_resume(cls, options: Any, unscheduled: bool, restores_local_state: bool) -> str:
        """Return why the resume is not exact: after a stop the pipeline fills again, and some steps are less stale."""
        return "the stop emptied the pipeline, which a resumed run has to fill again" if unscheduled else ""

    def close(self) -> None:
        """Wait for all stages: the last one finishes first, while others still receive what it sent (collective)."""
        import torch.distributed as dist

        self._pipeline.wait_until_sent()
        dist.barrier(self.comm.group)
