"""What to run, as data: the `Experiment`, made of the layout (layout.py) and of the other sections (sections.py).

It is read from and written to JSON, changed by dotted names (assignment.py), and judged by rules (rules.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from labkit.experiment import own_methods, safe_files
from labkit.experiment.assignment import assign, parse_assignment
from labkit.experiment.layout import Layout
from labkit.experiment.old_names import schedule_from_update_rule, with_new_names
from labkit.experiment.problem import ExperimentError, Problem, explain, unknown
from labkit.experiment.sections import (
    Gradients,
    Launch,
    Optimizer,
    Quantization,
    Section,
    Sparsity,
    Training,
    Workload,
)

if TYPE_CHECKING:
    from labkit.experiment.machine import Machine
    from labkit.experiment.run_directory import RunDirectory

SCHEMA_VERSION = 1
MAX_SOURCE = 1_000_000


class Experiment(Section):
    """Everything that defines a run. Frozen; `replace()` makes a changed copy; `problems()` says why it cannot run."""

    schema_version: int = SCHEMA_VERSION
    """Version of this format."""
    name: str = Field(default="", max_length=200)
    """A title in free text."""
    workload: Workload = Field(default_factory=Workload)
    layout: Layout = Layout()
    gradients: Gradients = Field(default_factory=Gradients)
    sparsity: Sparsity = Field(default_factory=Sparsity)
    quantization: Quantization = Field(default_factory=Quantization)
    optimizer: Optimizer = Optimizer()
    training: Training = Training(steps=100)
    launch: Launch = Launch()
    code: dict[str, str] = Field(default_factory=dict)
    """Source of the notebook cells that define methods of this experiment, by method; filled in automatically."""

    @model_validator(mode="before")
    @classmethod
    def _read_old_names(cls, data: Any) -> Any:
        return schedule_from_update_rule(data) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _carries_its_code(self) -> Experiment:
        code = {key: self.code.get(key) or own_methods.source(knob, key) for knob, key in self.own_method_keys()}
        code = {key: text for key, text in code.items() if text}
        if any(len(text) > MAX_SOURCE for text in code.values()):
            raise ValueError(f"the source of a method may have {MAX_SOURCE} characters at most")
        object.__setattr__(self, "code", code)  # the one thing that follows from the rest
        return self

    def own_method_keys(self) -> list[tuple[str, str]]:
        """Return knob and key of each chosen method that does not come with labkit (own_methods.py)."""
        from labkit.experiment.registry import open_registries

        chosen = ((methods.knob, self.get(methods.field)) for methods in open_registries())
        return [(knob, key) for knob, key in chosen if own_methods.is_own(key)]

    @field_validator("schema_version")
    @classmethod
    def _readable_version(cls, version: int) -> int:
        if version != SCHEMA_VERSION:
            raise ValueError(f"this labkit reads schema version {SCHEMA_VERSION}, the file has {version}")
        return version

    # -- in and out -------------------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, data: Any) -> Experiment:
        """Build an experiment from nested dicts; raises ExperimentError with one sentence per problem."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ExperimentError(explain(error, cls)) from None

    @classmethod
    def from_json(cls, text: str | bytes) -> Experiment:
        """Read an experiment from JSON text; raises ExperimentError."""
        try:
            data = safe_files.from_json(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
        except ValueError as error:
            raise ExperimentError([Problem("", _no_json(error))]) from None
        return cls.from_dict(data)

    @classmethod
    def load(cls, path: str | Path) -> Experiment:
        """Read a JSON file that the user names (a link or a pipe is allowed), at most 8 MiB; raises ExperimentError."""
        most = safe_files.MAX_JSON_BYTES
        try:
            with open(path, "rb") as file:
                text = file.read(most + 1)
            if len(text) > most:
                raise ValueError(f"it is larger than {most / 2**20:g} MiB")
            text.decode("utf-8")
        except (OSError, ValueError) as error:
            why = _no_json(error) if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", "") or error
            raise ExperimentError([Problem("", f"cannot read the experiment from {path}: {why}")]) from None
        return cls.from_json(text)

    @classmethod
    def of_run(cls, directory: RunDirectory) -> Experiment:
        """Return the experiment stored in a run directory; raises ExperimentError, which names the run.

        The directory may come from anywhere: see labkit.experiment.safe_files.
        """
        try:
            text = safe_files.read_bytes(directory.experiment, safe_files.MAX_JSON_BYTES)
            return cls.from_dict(safe_files.from_json(text))
        except ExperimentError as error:
            why = "; ".join(map(str, error.problems))
        except OSError as error:
            why = error.strerror or str(error)
        except ValueError as error:
            why = _no_json(error)
        raise ExperimentError([Problem("", f"the experiment of run {directory.id} cannot be read: {why}")])

    def to_dict(self) -> dict[str, Any]:
        """Return nested dicts of JSON values; `code` is there only if there is any."""
        data = self.model_dump(mode="json")
        if not data["code"]:
            del data["code"]
        return data

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False)

    # -- changed copies ---------------------------------------------------------------------------------------------

    def replace(self, *assignments: str, **values: Any) -> Experiment:
        """Return a changed copy: `replace("layout.dp_replicate=2", "training.steps=50")`.

        An assignment is `section.field=value` with the value in JSON (a bare word is a string), as after `--set` on the
        command line. Keyword arguments name top-level fields. Raises ExperimentError and leaves `self` unchanged.
        """
        data = self.to_dict()
        for key, value in values.items():
            if key not in type(self).model_fields:
                raise ExperimentError([unknown(key, key, type(self).model_fields)])
            data[key] = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
        for text in assignments:
            field, value = parse_assignment(text)
            assign(type(self), data, field, value)
        return type(self).from_dict(with_new_names(data, [parse_assignment(text)[0] for text in assignments]))

    def set(self, changes: Mapping[str, Any]) -> Experiment:
        """Return a changed copy from `{"layout.dp_replicate": 2}`: like `replace`, with values as Python objects."""
        data = self.to_dict()
        for field, value in changes.items():
            # A copy: a later change may go into what an earlier one has brought, and that belongs to the caller.
            assign(
                type(self),
                data,
                field,
                value.model_dump(mode="json") if isinstance(value, BaseModel) else deepcopy(value),
            )
        return type(self).from_dict(with_new_names(data, changes))

    def get(self, field: str) -> Any:
        """Return the value at a dotted name."""
        value: Any = self
        for part in field.split("."):
            if not hasattr(value, part):
                raise ExperimentError([Problem(field, f"there is no field {part!r} here")])
            value = getattr(value, part)
        return value

    def resolve(self, machine: Machine | None = None, world_size: int | None = None) -> Experiment:
        """Return a copy with nothing left open: device and number format are chosen, the axis that is -1 has its size.

        Raises ExperimentError if the sizes do not make the number of ranks.
        """
        from labkit.experiment.machine import Machine

        machine = machine or Machine.here()
        device = machine.device(self.launch.device)
        layout = self.layout
        try:
            if world_size is not None:
                layout = layout.resolve(world_size)
            elif -1 in layout.sizes.values():
                layout = layout.resolve(max(1, machine.slots(device)))
        except ValueError as error:
            raise ExperimentError([Problem("layout", str(error))]) from None
        launch = self.launch.model_copy(update={"device": device})
        quantization = self.quantization.resolve(device, machine)
        return self.model_copy(update={"layout": layout, "launch": launch, "quantization": quantization})

    # -- judgement --------------------------------------------------------------------------------------------------

    def problems(self, machine: Machine | None = None) -> list[Problem]:
        """Return every reason why this experiment cannot run on `machine` (this one, if None); empty if it can."""
        from labkit.experiment.rules import problems

        return problems(self, machine)

    def warnings(self, machine: Machine | None = None) -> list[Problem]:
        """Return what will run but may not mean what the user expects, e.g. more ranks than cores."""
        from labkit.experiment.rules import warnings

        return warnings(self, machine)

    def check(self, machine: Machine | None = None) -> Experiment:
        """Return the resolved experiment, or raise ExperimentError if it has any problem."""
        problems = self.problems(machine)
        if problems:
            raise ExperimentError(problems)
        return self.resolve(machine)

    @property
    def title(self) -> str:
        """The user's name for the run, or the workload and the layout."""
        return self.name or f"{self.workload.name} {self.layout}"

    def __str__(self) -> str:
        length = f"{self.training.steps} steps" if self.training.steps else f"{self.training.epochs:g} epochs"
        return f"{self.title}: {length} of {self.training.global_batch} samples on layout {self.layout}"


def _no_json(error: Exception) -> str:
    """Return in a clause why a text is not JSON."""
    return "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else f"this is not JSON ({error})"
