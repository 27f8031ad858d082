"""Descriptions of every field of an experiment, for the command line and for tests of the form."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from labkit.experiment.choice import Choice
from labkit.experiment.layout import Layout
from labkit.experiment.schema import Experiment


@dataclass(frozen=True)
class Field:
    """One setting: dotted name, kind (`int ≥ 1`, `adamw | sgd`), default and description."""

    name: str
    kind: str
    default: Any
    description: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def fields(model: type[BaseModel] = Experiment, prefix: str = "") -> list[Field]:
    """Return all fields below `model`, with the options of every available method."""
    described: list[Field] = []
    for name, info in model.model_fields.items():
        dotted = f"{prefix}{name}"
        section = next((kind for kind in (info.annotation, *get_args(info.annotation)) if _is_section(kind)), None)
        if section is not None:
            described += fields(section, f"{dotted}.")
        else:
            kind = _kind(info, model, name)
            described.append(
                Field(dotted, kind, _plain(info.get_default(call_default_factory=True)), info.description or "")
            )
    if issubclass(model, Choice):
        for method in model.methods():
            for option in fields(model.methods().options(method.key), prefix):
                described.append(
                    Field(option.name, option.kind, option.default, f"[{method.key}] {option.description}")
                )
    return described


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _kind(info: Any, model: type[BaseModel], name: str) -> str:
    """Return the legal values of a field in words, such as `int (≥ 1)` or `adamw | sgd`."""
    if issubclass(model, Choice) and name == model.SELECTOR:
        return " | ".join(model.methods().names())
    if model is Layout and name == "schedule":
        from labkit.experiment.registry import registry

        return " | ".join(registry("layout.schedule").names())
    alone = get_origin(info.annotation) in (None, Literal, dict)
    parts = (info.annotation,) if alone else get_args(info.annotation)
    words = []
    for part in parts:
        if part is NoneType:
            words.append("null")
        elif get_origin(part) is Literal:
            words += [str(value) for value in get_args(part)]
        elif get_origin(part) is dict:
            words.append("{" + ": ".join(kind.__name__ for kind in get_args(part)) + "}")
        else:
            words.append(getattr(part, "__name__", str(part)))
    bounds = []
    for rule in info.metadata:
        for attribute, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
            if getattr(rule, attribute, None) is not None:
                bounds.append(f"{sign} {getattr(rule, attribute)}")
    return " | ".join(words) + (f" ({', '.join(bounds)})" if bounds else "")


def _plain(value: Any) -> Any:
    """Return a default as plain JSON data; None for a field without a default."""
    if value is PydanticUndefined:  # a field that must be given
        return None
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value
