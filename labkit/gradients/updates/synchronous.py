"""Synchronous training, the baseline of all update rules: all ranks wait for the mean of all gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from labkit.experiment.registry import Options as BaseOptions
from labkit.gradients.updates.update import UpdateRule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from labkit.experiment import Experiment
    from labkit.experiment.machine import Machine
    from labkit.experiment.problem import Problem
    from labkit.gradients.exchange import Counters


class Synchronous(UpdateRule):
    """Lets all ranks wait for the mean of all gradients before they change a weight."""

    masks_reach_optimizer = True
    uses_ddp = one_batch = True

    class Options(BaseOptions):
        pass

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield nothing: it runs with every experiment."""
        return iter(())

    def forward_backward(self, model: Any, last: bool, step: int) -> AbstractContextManager[Any]:
        """Return a context manager that keeps DDP from reducing gradients, except in the last pass of a step."""
        return nullcontext() if last else model.no_sync()

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Return a context manager that does nothing: all ranks hold the same weights."""
        return nullcontext()

    def average_replicas(self, step: int) -> None:
        """Do nothing: all ranks hold the same state."""

    def counters(self) -> Counters | None:
        """Return None: only gradients are sent, and the model counts them."""
        return None
