"""Methods by name. A new method is one file in one package and one line in that package's `registry.py`.

A registry is a plain table that imports nothing heavy:

    COMPRESSION = Registry("gradients.compression.method", "compression method", [
        Method("none", "gradients are sent as they are", "labkit.gradients.compression.plain:Uncompressed"),
        ...
    ], base="labkit.gradients.compression.compressor:Compressor")

The package `experiment` finds a registry by its dotted name and imports it only to check a choice, so that
`import labkit` stays free of torch. The target class carries the method's `Options` (an `Options` model), its
`problems(experiment, machine)` and its worker code; the file imports torch inside its worker functions.

A registry with a base class is open: it also takes classes that do not come with labkit (own_methods.py).
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from typing import Any

from pydantic import BaseModel, ConfigDict

from labkit.experiment import own_methods
from labkit.experiment.fault import describe_error
from labkit.experiment.machine import Machine
from labkit.experiment.problem import closest


class Options(BaseModel):
    """Base of every method's options: frozen, unknown names refused, NaN and infinity refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


@dataclass(frozen=True)
class Method:
    """One line of a registry. `target` is `module:Class`."""

    key: str
    summary: str
    target: str
    is_loaded: bool = True
    """False if the code of this own method must not run in this process: `target` is the base class in its place."""
    own_class: type | None = None
    """The class of an own method, which has no `target` that could be imported."""

    def missing(self, machine: Machine) -> str:
        """Return why `machine` cannot offer the method, as its class says (`missing(machine)`); empty if it can."""
        missing = getattr(self.load(), "missing", None)
        return "" if missing is None else str(missing(machine))

    def load(self) -> Any:
        """Import and return the class that implements the method (see `is_loaded`)."""
        return _attribute(self.target) if self.own_class is None else self.own_class

    def options(self) -> type[Options]:
        """Return the options model of the method."""
        model: type[Options] = getattr(self.load(), "Options", Options)
        return model


@dataclass(frozen=True)
class Registry:
    """The methods of one knob, in the order in which the form shows them."""

    field: str
    what: str
    methods: list[Method] = dataclasses.field(default_factory=list)
    base: str = ""
    """Base class of the methods, as `module:Class`; empty for a registry that takes no others."""

    @cached_property
    def knob(self) -> str:
        """The name under which `registry` finds it: that of the section, or of the field if there is no section."""
        return self.field.removesuffix(".method")

    def __iter__(self) -> Iterator[Method]:
        yield from self.methods
        if self.base:
            yield from self._installed
            yield from map(self._own, own_methods.listed(self.knob))

    @cached_property
    def _installed(self) -> list[Method]:
        """The methods of installed packages; a name that labkit uses itself stays labkit's.

        One that cannot be imported, or has another base class, is left out with a warning: a broken package must not
        take the form and the commands with it.
        """
        keys = {method.key for method in self.methods}
        usable = []
        for name, (target, package) in own_methods.entry_points(self.knob).items():
            method = Method(name, f"from the package {package}", target)
            reason = "labkit has a method of this name" if name in keys else self._why_unusable(method)
            if reason:
                text = f"{self.field}={name} of the package {package} is left out: {reason}"
                warnings.warn(text, FutureWarning, stacklevel=2)
            else:
                usable.append(method)
        return usable

    def _why_unusable(self, method: Method) -> str:
        try:
            implementation = method.load()
        except Exception as error:
            return describe_error(error)
        base = self.base_class()
        fits = isinstance(implementation, type) and issubclass(implementation, base)
        return "" if fits else f"it is not a subclass of {base.__name__}"

    def _own(self, key: str) -> Method:
        own = own_methods.loaded(self.knob, key)
        summary = f"your class {own_methods.class_name(key)}"
        return Method(key, summary, self.base, own is not None, own.implementation if own is not None else None)

    def base_class(self) -> Any:
        """Return the base class of an open registry's methods."""
        return _attribute(self.base)

    def names(self) -> list[str]:
        """Return the keys of all methods that are listed."""
        return [method.key for method in self]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._find(key) is not None

    def _find(self, key: str) -> Method | None:
        for method in self.methods:
            if method.key == key:
                return method
        if self.base and own_methods.is_own(key):
            return self._own(key)
        return next((method for method in self if method.key == key), None)

    def __getitem__(self, key: str) -> Method:
        method = self._find(key)
        if method is not None:
            return method
        guess = closest(key, self.names())
        meant = f"; did you mean {guess}?" if guess else ""
        raise KeyError(f"unknown {self.what} {key!r}; known: {', '.join(self.names())}{meant}")

    def options(self, key: str) -> type[Options]:
        """Return the options model of a method."""
        return self[key].options()


# Where the registry of each knob is defined. This is the only list of registries.
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
"""Module of the rules of `launch.network`, next to the code that emulates it."""


def network_rules() -> Any:
    """Return the module with the rules of `launch.network`: `problems`, `warnings` and `possible`."""
    return import_module(NETWORK_RULES)


def registry(knob: str) -> Registry:
    """Return the registry of a knob, e.g. `registry("gradients.compression")`."""
    methods: Registry = _attribute(ROOMS[knob])
    return methods


def _attribute(target: str) -> Any:
    """Return what `module:name` names; the module is imported the first time.

    Rules ask thousands of times, and `import_module` is slow even for a module that has been imported. It is called all
    the same if the name is not there yet: it waits until the thread that is importing the module has finished.
    """
    module, _, name = target.partition(":")
    try:
        return getattr(sys.modules[module], name)
    except (KeyError, AttributeError):
        return getattr(import_module(module), name)


def registries() -> Iterable[tuple[str, Registry]]:
    """Return every knob with its registry."""
    return ((knob, registry(knob)) for knob in ROOMS)


@cache
def open_registries() -> tuple[Registry, ...]:
    """Return the registries that take classes which do not come with labkit."""
    return tuple(methods for _, methods in registries() if methods.base)
