"""One setting of the form: a widget made from a pydantic field, read and written as the field's value."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

import ipywidgets as widgets
from pydantic.fields import FieldInfo

from labkit.experiment.machine import Machine
from labkit.experiment.registry import Registry

_WORDS = {
    "lr": "Learning rate",
    "eps": "Epsilon",
    "qat": "Quantization-aware training",
    "bucket_mb": "Bucket (MB)",
    "dp_replicate": "Data-parallel ranks",
    "dp_shard": "Sharded ranks",
    "tp": "Tensor-parallel ranks",
    "cp": "Context-parallel ranks",
    "ep": "Expert-parallel ranks",
    "pp": "Pipeline stages",
    "zero_stage": "ZeRO stage",
    "name": "Name",
    "clip_norm": "Clip gradient norm",
    "threads_per_rank": "Threads per rank",
    "isolated": "Independent copies",
    "slowdown": "Slowed ranks",
    "hosts": "Emulated hosts",
    "head": "Narrow the last layer",
    "qat_start": "Begin rounding after",
}
_BY_FIELD = {
    "workload.name": "Workload",
    "gradients.compression.method": "Compression",
    "gradients.update.method": "Update",
    "sparsity.method": "Sparsity",
    "quantization.training": "Number format",
    "name": "Title of the run",
}
_UNITS = {"_mb": "MB", "_s": "s", "_ms": "ms", "_mbit": "Mbit/s"}
NOT_YET = "(not in this version yet)"
NOT_HERE = "(not here)"


def label(field: str) -> str:
    """Words for a field: `training.global_batch` is `Global batch`."""
    last = field.rsplit(".", 1)[-1]
    if field in _BY_FIELD or last in _WORDS:
        return _BY_FIELD.get(field) or _WORDS[last]
    for suffix, unit in _UNITS.items():
        if last.endswith(suffix):
            last = f"{last.removesuffix(suffix)} ({unit})"
            break
    words = last.replace("_", " ")
    return words[:1].upper() + words[1:]


def tooltip(field: str, info: FieldInfo) -> str:
    """The description, the range and the dotted name of a field."""
    bounds = []
    for part in info.metadata:
        for name, words in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
            bound = getattr(part, name, None)
            if bound is not None:
                bounds.append(f"{words} {bound}")
    allowed = f" Allowed: {', '.join(bounds)}." if bounds else ""
    return f"{info.description or label(field)}{allowed} [{field}]"


@dataclass
class Entry:
    """A widget and how its value becomes the field's value; `read` raises ValueError with a clause for people."""

    field: str
    widget: Any
    read: Callable[[], Any]
    write: Callable[[Any], None]

    def observe(self, changed: Callable[[Any], None]) -> None:
        self.widget.observe(changed, names="value")


def entry(field: str, info: FieldInfo, value: Any, methods: Registry | None = None) -> Entry:
    """The entry for a leaf field. `methods` makes it a choice from a registry, with the planned ones marked."""
    kind, optional = _unwrap(info.annotation)
    common = {"description": label(field), "tooltip": tooltip(field, info)}
    if methods is not None:
        missing = {method.key: method.missing(Machine.here()) for method in methods}
        shown = [(_method(method, missing[method.key]), method.key) for method in methods]
        known = "; ".join(f"{method.key}: {method.summary}" for method in methods if method.available)
        absent = "".join(f" Not on this machine: {reason}." for reason in missing.values() if reason)
        common["tooltip"] = f"{common['tooltip']} {known}.{absent}"
        return _pick(field, shown, value, common)
    if get_origin(kind) is Literal:
        shown = [(str(item), item) for item in get_args(kind)]
        return _pick(field, [*([("none", None)] if optional else []), *shown], value, common)
    if kind is bool and not optional:
        box = widgets.Checkbox(value=bool(value), indent=True, **common)
        return _plain(field, box)
    if kind is int and not optional:
        return _plain(field, widgets.IntText(value=value, continuous_update=True, **common))
    if kind is float and not optional:
        return _plain(field, widgets.FloatText(value=value, continuous_update=True, step=None, **common))
    if kind in (int, float):
        return _number_or_nothing(field, kind, value, common)
    if kind is str and not optional:
        make = widgets.Textarea if isinstance(value, str) and "\n" in value else widgets.Text
        return _plain(field, make(value=value, continuous_update=True, **common))
    return _anything(field, kind, optional, value, common)


def _unwrap(annotation: Any) -> tuple[Any, bool]:
    """The type without `| None`, and whether None is allowed."""
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [part for part in get_args(annotation) if part is not type(None)]
        optional = len(parts) < len(get_args(annotation))
        return (parts[0] if len(parts) == 1 else Any), optional
    return annotation, False


def _method(method: Any, missing: str) -> str:
    if not method.available:
        return f"{method.key} {NOT_YET}"
    return f"{method.key} {NOT_HERE}" if missing else method.key


def _plain(field: str, widget: Any) -> Entry:
    return Entry(field, widget, lambda: widget.value, lambda value: setattr(widget, "value", value))


def _pick(field: str, shown: list[tuple[str, Any]], value: Any, common: dict[str, Any]) -> Entry:
    if all(value != item for _, item in shown):
        shown = [*shown, (str(value), value)]  # a file may name what this version does not know
    return _plain(field, widgets.Dropdown(options=shown, value=value, **common))


def _number_or_nothing(field: str, kind: Any, value: Any, common: dict[str, Any]) -> Entry:
    """A text line, because number boxes cannot be empty."""
    box = widgets.Text(value=_spelled(value), placeholder="none", continuous_update=True, **common)

    def read() -> Any:
        text = box.value.strip()
        if not text:
            return None
        try:
            number = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise ValueError(f"must be {what} or empty, got {text[:40]!r}") from None
        if not math.isfinite(number):
            raise ValueError(f"must be a finite number, got {text[:40]!r}")
        return number

    return Entry(field, box, read, lambda value: setattr(box, "value", _spelled(value)))


def _spelled(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else repr(value)


def _anything(field: str, kind: Any, optional: bool, value: Any, common: dict[str, Any]) -> Entry:
    """Lists, dicts and optional text: optional text as it is, the rest as JSON."""
    is_text = kind is str or not (get_origin(kind) in (list, tuple, dict) or kind in (list, tuple, dict, Any))

    def spell(value: Any) -> str:
        return "" if value is None else value if is_text and isinstance(value, str) else json.dumps(value)

    make = widgets.Textarea if "\n" in spell(value) else widgets.Text
    box = make(value=spell(value), placeholder="none" if optional else "", continuous_update=True, **common)

    def read() -> Any:
        if optional and not box.value.strip():
            return None
        if is_text:
            return box.value
        try:
            return json.loads(box.value)
        except ValueError:
            raise ValueError(f"cannot read {' '.join(box.value.split())[:40]!r} as JSON") from None

    return Entry(field, box, read, lambda value: setattr(box, "value", spell(value)))
