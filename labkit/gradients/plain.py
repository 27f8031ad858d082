"""Plain gradient averaging: full precision, every update synchronous. What every other method is compared with."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from labkit.experiment.registry import Options as BaseOptions
from labkit.gradients.update import Rounds

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from labkit.experiment import Experiment
    from labkit.experiment.machine import Machine
    from labkit.experiment.problem import Problem


class Uncompressed:
    """Gradients travel as they are.

    A ring all-reduce of n bytes over N ranks sends 2·(N-1)/N·n bytes from every rank (Patarasuk and Yuan, 2009).
    """

    class Options(BaseOptions):
        pass

    @staticmethod
    def attach(model: nn.Module) -> None:
        """Install the compressor on the replicated model: nothing to install."""

    @staticmethod
    def bytes_per_step(gradient_bytes: int, ranks: int) -> int:
        """Bytes that one rank sends per update."""
        return round(2 * (ranks - 1) / ranks * gradient_bytes)


class Synchronous(Rounds):
    """All ranks wait for the average of all gradients before anyone changes a weight."""

    exchanges = True

    class Options(BaseOptions):
        pass

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """It goes with everything."""
        return iter(())

    def passes(self, model: Any, last: bool, step: int) -> AbstractContextManager[Any]:
        """Only the last pass of an update exchanges gradients."""
        return nullcontext() if last else model.no_sync()

    def judged(self) -> AbstractContextManager[None]:
        """All ranks hold the same weights."""
        return nullcontext()

    def consolidate(self, step: int) -> None:
        """All ranks hold the same state."""
