"""No sparsity: every weight is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from labkit.experiment.problem import Problem
from labkit.experiment.registry import Options as BaseOptions
from labkit.sparsity.method import Sparsifier

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from labkit.experiment import Experiment
    from labkit.experiment.machine import Machine


class Dense(Sparsifier):
    """All connections stay."""

    class Options(BaseOptions):
        pass

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """It runs everywhere, and there is nothing to export."""
        if experiment.sparsity.export:
            said = "a dense network has no faster form than its own (sparsity.method is none)"
            yield Problem("sparsity.export", said, "false")

    @staticmethod
    def shapes(model: nn.Module, options: Any) -> dict[str, tuple[int, ...]]:
        """None."""
        return {}
