"""Load the classes of own methods (own_methods.py): from a cell of this notebook, and on the ranks of a run."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from labkit.experiment import own_methods
from labkit.experiment.cell_source import load_source, source_of_class
from labkit.experiment.locate import load as load_located
from labkit.experiment.machine import Machine
from labkit.experiment.own_methods import OwnClass
from labkit.experiment.registry import Options, base_class, registry
from labkit.experiment.schema import Experiment

SECTIONS = {
    "gradients.compression": "gradients.compression.method",
    "gradients.update": "gradients.update.method",
    "sparsity": "sparsity.method",
    "quantization.training": "quantization.training",
}
"""Knobs whose registries are open, and the fields in which experiments name the method."""


def method_from_cell(implementation: type) -> Any:
    """Let a class of a notebook cell be chosen as a method, and return what an experiment says of it.

    The kind of method follows from its base class (`Compressor`, `UpdateRule`, `Sparsifier`, `Single`). Returns the
    section, e.g. `{"method": "cell:Halves@1f0c2a9e"}`, or the key alone for a number format, which has no section.
    Raises TypeError or NotSelfContainedError (a ValueError) with the reason why the class cannot be used.
    """
    knob = _knob_of(implementation)
    _insist_on_methods(implementation, knob)
    source = source_of_class(implementation)
    key = own_methods.cell_key(implementation.__name__, source)
    own_methods.register(key, OwnClass(implementation, knob, source))
    return {"method": key} if SECTIONS[knob].endswith(".method") else key


def load_own_methods(experiment: Experiment) -> Experiment:
    """Load the own methods of an experiment in this process, and return it with their options checked.

    Runs the code that the experiment names or contains: call it on the ranks of a run only. Raises ValueError with one
    sentence if a class cannot be loaded or refuses the experiment (ExperimentError is one).
    """
    keys = experiment.own_methods()
    if not keys:
        return experiment
    for knob, field in SECTIONS.items():
        key = experiment.get(field)
        if own_methods.is_own(key) and own_methods.loaded(key) is None:
            implementation = _load(key, experiment.code.get(key))
            if not (isinstance(implementation, type) and issubclass(implementation, base_class(knob))):
                raise ValueError(f"{field}: {key} is not a subclass of {_name_of_base(knob)}")
            _insist_on_methods(implementation, knob)
            own_methods.register(key, OwnClass(implementation, knob, experiment.code.get(key, "")))
    checked = Experiment.from_dict(experiment.to_dict())
    for problem in _problems(checked):
        raise ValueError(str(problem))
    return checked


def _load(key: str, source: str | None) -> Any:
    if not own_methods.from_cell(key):
        return load_located(key)
    if source is None:
        raise ValueError(f"the experiment does not contain the source of {key}")
    return load_source(source, own_methods.class_name(key))


def _problems(experiment: Experiment) -> Iterator[Any]:
    """Yield what the own methods themselves have against the experiment."""
    for knob, field in SECTIONS.items():
        key = experiment.get(field)
        if own_methods.is_own(key):
            rules = getattr(registry(knob)[key].load(), "problems", None)
            yield from rules(experiment, Machine.here()) if rules is not None else ()


def _knob_of(implementation: type) -> str:
    for knob in SECTIONS:
        if issubclass(implementation, base_class(knob)):
            return knob
    bases = ", ".join(_name_of_base(knob) for knob in SECTIONS)
    raise TypeError(f"{implementation.__name__} is not a method: it must be a subclass of one of {bases}")


def _name_of_base(knob: str) -> str:
    return registry(knob).base.replace(":", ".")


def _insist_on_methods(implementation: type, knob: str) -> None:
    """Raise TypeError if the class lacks what labkit calls, or has options that cannot be checked."""
    name = implementation.__name__
    for required, purpose in REQUIRED.get(knob, {}).items():
        if getattr(implementation, required) is getattr(base_class(knob), required) or (
            inspect.ismethod(getattr(implementation, required))
            and getattr(implementation, required).__func__ is getattr(base_class(knob), required).__func__
        ):
            raise TypeError(f"{name} has no {required}: {purpose}")
    options = getattr(implementation, "Options", Options)
    if not (isinstance(options, type) and issubclass(options, Options)):
        raise TypeError(f"{name}.Options is not a subclass of labkit.experiment.registry.Options")


REQUIRED: dict[str, dict[str, str]] = {
    "gradients.compression": {
        "reduce": "it averages a bucket of gradients over the ranks",
        "bucket_bytes": "the formula of the bytes that one rank sends for a bucket; labkit counts and compares",
    },
    "sparsity": {
        "changes_masks": "it says after which optimizer steps new masks are chosen",
        "choose_masks": "it returns the masks",
    },
}
"""Methods that a subclass must define, and what they are for."""
