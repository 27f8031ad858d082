"""Methods by name. A new method is one file in one room and one line in that room's `registry.py`.

A room's registry is a plain table that imports nothing heavy:

    COMPRESSION = Registry("gradients.compression", "compression method", [
        Method("none", "gradients travel as they are", "labkit.gradients.none:NoCompression"),
        Method("topk", "only the largest entries travel"),            # no target: not in this version yet
    ])

The experiment layer finds a room by its dotted name and imports it only when a choice has to be checked, so that
`import labkit` stays free of torch. The target class carries the method's `Options` (an `Options` model), its
`problems(experiment, machine)` and its worker code; the file imports torch inside its worker functions.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from pydantic import BaseModel, ConfigDict

from labkit.experiment.machine import Machine
from labkit.experiment.problem import closest


class Options(BaseModel):
    """Base of every method's options: frozen, unknown names refused, NaN and infinity refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


@dataclass(frozen=True)
class Method:
    """One line of a registry. `target` is `module:Class`; without it the method is planned and is refused as such."""

    key: str
    summary: str
    target: str | None = None

    @property
    def available(self) -> bool:
        return self.target is not None

    def missing(self, machine: Machine) -> str:
        """Why `machine` cannot offer an available method, as its class says (`missing(machine)`); empty if it can."""
        asked = getattr(self.load(), "missing", None) if self.available else None
        return "" if asked is None else str(asked(machine))

    def load(self) -> Any:
        """Import and return the class that implements the method."""
        if self.target is None:
            raise ValueError(f"{self.key} is not in this version of labkit yet")
        return _attribute(self.target)


@dataclass(frozen=True)
class Registry:
    """The methods of one knob, in the order in which the form shows them."""

    field: str
    what: str
    methods: list[Method] = dataclasses.field(default_factory=list)

    def __iter__(self) -> Any:
        return iter(self.methods)

    def names(self, available_only: bool = False) -> list[str]:
        return [method.key for method in self.methods if method.available or not available_only]

    def __contains__(self, key: object) -> bool:
        return any(method.key == key for method in self.methods)

    def __getitem__(self, key: str) -> Method:
        for method in self.methods:
            if method.key == key:
                return method
        guess = closest(key, self.names())
        meant = f"; did you mean {guess}?" if guess else ""
        raise KeyError(f"unknown {self.what} {key!r}; known: {', '.join(self.names())}{meant}")

    def options(self, key: str) -> type[Options]:
        """Return the options model of an available method."""
        model: type[Options] = getattr(self[key].load(), "Options", Options)
        return model


# Where each knob's registry stands. The only list of rooms.
ROOMS: dict[str, str] = {
    "workload": "labkit.workloads.registry:WORKLOADS",
    "layout.axes": "labkit.parallel.registry:AXES",
    "layout.schedule": "labkit.parallel.registry:SCHEDULES",
    "gradients.compression": "labkit.gradients.registry:COMPRESSION",
    "gradients.update": "labkit.gradients.registry:UPDATE",
    "sparsity": "labkit.sparsity.registry:SPARSITY",
    "quantization.training": "labkit.quantization.registry:TRAINING",
    "quantization.qat": "labkit.quantization.registry:QAT",
    "quantization.after_training": "labkit.quantization.registry:AFTER_TRAINING",
}


NETWORK_RULES = "labkit.netem.rules"
"""Where the rules of `launch.network` stand, beside the code that emulates it."""


def network_rules() -> Any:
    """Return the module with the rules of `launch.network`: `problems`, `warnings` and `possible`."""
    return import_module(NETWORK_RULES)


def registry(knob: str) -> Registry:
    """Return the registry of a knob, e.g. `registry("gradients.compression")`."""
    methods: Registry = _attribute(ROOMS[knob])
    return methods


def _attribute(target: str) -> Any:
    """Return what `module:name` names; the module is imported the first time.

    Rules ask thousands of times, and `import_module` is slow even for a module that is there.
    """
    module, _, name = target.partition(":")
    return getattr(sys.modules.get(module) or import_module(module), name)


def registries() -> Iterable[tuple[str, Registry]]:
    """Every knob with its registry."""
    return ((knob, registry(knob)) for knob in ROOMS)
