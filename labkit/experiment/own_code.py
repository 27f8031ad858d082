"""Load the classes of own methods (own_methods.py): from a cell of this notebook, and on the ranks of a run."""

from __future__ import annotations

from typing import Any

from labkit.experiment import own_methods
from labkit.experiment.cell_source import load_source, source_of_class
from labkit.experiment.locate import load as load_located
from labkit.experiment.machine import Machine
from labkit.experiment.own_methods import OwnClass
from labkit.experiment.registry import Options, Registry, open_registries, registry
from labkit.experiment.schema import Experiment


def method_from_cell(implementation: type) -> Any:
    """Let a class of a notebook cell be chosen as a method, and return what an experiment says of it.

    The kind of method follows from its base class (`Compressor`, `UpdateRule`, `Sparsifier`, `Single`,
    `PipelineSchedule`). Returns the section, e.g. `{"method": "cell:Halves@1f0c2a9e"}`, or the key alone for a number
    format or a schedule, which have no section.
    Raises TypeError or NotSelfContainedError (a ValueError) with the reason why the class cannot be used.
    """
    methods = _registry_of(implementation)
    _insist_on_methods(implementation, methods)
    source = source_of_class(implementation)
    key = own_methods.cell_key(implementation.__name__, source)
    own_methods.register(methods.knob, key, OwnClass(implementation, source))
    return {"method": key} if methods.field.endswith(".method") else key


def load_own_methods(experiment: Experiment) -> Experiment:
    """Load the own methods of an experiment in this process, and return it with their options checked.

    Runs the code that the experiment names or contains: call it on the ranks of a run only. Raises ValueError with one
    sentence if a class cannot be loaded or refuses the experiment (ExperimentError is one).
    """
    keys = experiment.own_method_keys()
    if not keys:
        return experiment
    for knob, key in keys:
        if own_methods.loaded(knob, key) is None:
            methods, source = registry(knob), experiment.code.get(key)
            implementation = _load(key, source)
            if not (isinstance(implementation, type) and issubclass(implementation, methods.base_class())):
                raise ValueError(f"{methods.field}: {key} is not a subclass of {_name_of_base(methods)}")
            _insist_on_methods(implementation, methods)
            own_methods.register(knob, key, OwnClass(implementation, source or ""))
    checked = Experiment.from_dict(experiment.to_dict())
    for knob, key in keys:
        rules = getattr(registry(knob)[key].load(), "problems", None)
        for problem in rules(checked, Machine.here()) if rules is not None else ():
            raise ValueError(str(problem))
    return checked


def _load(key: str, source: str | None) -> Any:
    if not own_methods.from_cell(key):
        return load_located(key)
    if source is None:
        raise ValueError(f"the experiment does not contain the source of {key}")
    return load_source(source, own_methods.class_name(key))


def _registry_of(implementation: type) -> Registry:
    for methods in open_registries():
        if issubclass(implementation, methods.base_class()):
            return methods
    bases = ", ".join(map(_name_of_base, open_registries()))
    raise TypeError(f"{implementation.__name__} is not a method: it must be a subclass of one of {bases}")


def _name_of_base(methods: Registry) -> str:
    return methods.base.replace(":", ".")


def _insist_on_methods(implementation: type, methods: Registry) -> None:
    """Raise TypeError if the class lacks what labkit calls, or has options that cannot be checked."""
    name, parents = implementation.__name__, implementation.__mro__
    defined = {member for cls in parents[: parents.index(methods.base_class())] for member in vars(cls)}
    for required, purpose in REQUIRED.get(methods.knob, {}).items():
        if required not in defined:
            raise TypeError(f"{name} has no {required}: {purpose}")
    options = getattr(implementation, "Options", Options)
    if not (isinstance(options, type) and issubclass(options, Options)):
        raise TypeError(f"{name}.Options is not a subclass of labkit.experiment.registry.Options")


REQUIRED: dict[str, dict[str, str]] = {
    "layout.schedule": {"actions": "it returns what a rank of the pipeline computes, in its order"},
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
