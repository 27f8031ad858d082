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
    """Keeps all weights."""

    class Options(BaseOptions):
        pass

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield a reason if an export is asked for; otherwise it runs with every experiment."""
        if experiment.sparsity.export:
            reason = "a dense network has no faster form than its own (sparsity.method is none)"
            yield Problem("sparsity.export", reason, "false")

    @staticmethod
    def shapes(model: nn.Module, options: Any) -> dict[str, tuple[int, ...]]:
        """Return {}: no weight may become zero."""
        return {}
