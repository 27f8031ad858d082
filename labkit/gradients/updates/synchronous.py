"""The rule that every other one is compared with: all ranks wait for the mean of all gradients."""

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
    """All ranks wait for the average of all gradients before anyone changes a weight."""

    uses_ddp = one_batch = True

    class Options(BaseOptions):
        pass

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """It goes with everything."""
        return iter(())

    def forward_backward(self, model: Any, last: bool, step: int) -> AbstractContextManager[Any]:
        """Only the last pass of an update exchanges gradients."""
        return nullcontext() if last else model.no_sync()

    def averaged_weights(self) -> AbstractContextManager[None]:
        """All ranks hold the same weights."""
        return nullcontext()

    def average_replicas(self, step: int) -> None:
        """All ranks hold the same state."""

    def counters(self) -> Counters | None:
        """Gradients are all that travels."""
        return None
