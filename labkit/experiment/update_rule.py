"""The update rule in effect: the one that is set, or that of an asynchronous pipeline schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from labkit.experiment.registry import registry

if TYPE_CHECKING:
    from labkit.experiment.schema import Experiment

SYNCHRONOUS = "synchronous"
"""The rule by which all ranks take every step together, with the mean of their gradients."""


@dataclass(frozen=True)
class UpdateRuleInForce:
    """The update rule in effect, and the setting that selects it."""

    key: str
    """Name of the rule, or of the schedule that includes it."""
    field: str
    """The setting that selects it."""
    nearest_synchronous: str
    """The nearest value of that setting with which training is synchronous."""
    load: Callable[[], tuple[Any, Any]]
    """Function that imports the class and returns it with its options, an instance of its `Options`."""

    @property
    def is_synchronous(self) -> bool:
        """Whether this is the rule of synchronous training."""
        return self.key == SYNCHRONOUS


def update_rule(experiment: Experiment) -> UpdateRuleInForce:
    """Return the update rule with which `experiment` trains."""
    layout, update = experiment.layout, experiment.gradients.update
    if layout.order.asynchronous:
        method = registry("layout.schedule")[layout.schedule]
        return UpdateRuleInForce(method.key, "layout.schedule", "1f1b", lambda: (method.load(), method.options()()))
    return UpdateRuleInForce(update.method, "gradients.update.method", SYNCHRONOUS, update.load)
