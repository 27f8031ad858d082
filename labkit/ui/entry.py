"""One setting of the form: a widget for a pydantic field, which reads and writes the value of the field."""

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
from labkit.experiment.own_methods import class_name, is_own
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
    "head": "Quantize the output layer",
    "qat_start": "QAT starts at",
}
_BY_FIELD = {
    "workload.name": "Workload",
    "gradients.compression.method": "Compression",
    "gradients.update.method": "Update rule",
    "sparsity.method": "Sparsity",
    "quantization.training": "Precision",
    "name": "Title of the run",
}
_UNITS = {"_mb": "MB", "_s": "s", "_ms": "ms", "_mbit": "Mbit/s"}
NOT_HERE = "(unavailable here)"


def label(field: str) -> str:
    """Return the label of a field: `Global batch` for `training.global_batch`."""
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
    """Return the description, the range and the dotted name of a field."""
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
    """A widget and the functions that read and write the value of its field; `read` raises ValueError with a reason."""

    field: str
    widget: Any
    read: Callable[[], Any]
    write: Callable[[Any], None]

    def observe(self, changed: Callable[[Any], None]) -> None:
        """Call `changed` whenever the value of the widget changes."""
        self.widget.observe(changed, names="value")


def entry(field: str, info: FieldInfo, value: Any, methods: Registry | None = None) -> Entry:
    """Return the entry for a leaf field; with `methods`, a choice from a registry that marks unavailable methods."""
    kind, optional = unwrap_optional(info.annotation)
    common = {"description": label(field), "tooltip": tooltip(field, info)}
    if methods is not None:
        missing = {method.key: method.missing(Machine.here()) for method in methods}
        options = [(_option_label(method, missing[method.key]), method.key) for method in methods]
        summaries = "; ".join(f"{method.key}: {method.summary}" for method in methods)
        unavailable = "".join(f" Unavailable on this machine: {reason}." for reason in missing.values() if reason)
        common["tooltip"] = f"{common['tooltip']} {summaries}.{unavailable}"
        return _dropdown(field, options, value, common)
    if get_origin(kind) is Literal:
        options = [(str(item), item) for item in get_args(kind)]
        return _dropdown(field, [*([("none", None)] if optional else []), *options], value, common)
    if kind is bool and not optional:
        box = widgets.Checkbox(value=bool(value), indent=True, **common)
        return _simple_entry(field, box)
    if kind is int and not optional:
        return _simple_entry(field, widgets.IntText(value=value, continuous_update=True, **common))
    if kind is float and not optional:
        return _simple_entry(field, widgets.FloatText(value=value, continuous_update=True, step=None, **common))
    if kind in (int, float):
        return _optional_number(field, kind, value, common)
    if kind is str and not optional:
        make = widgets.Textarea if isinstance(value, str) and "\n" in value else widgets.Text
        return _simple_entry(field, make(value=value, continuous_update=True, **common))
    return _text_entry(field, kind, optional, value, common)


def unwrap_optional(annotation: Any) -> tuple[Any, bool]:
    """Return the type without `| None`, and whether None is allowed."""
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [part for part in get_args(annotation) if part is not type(None)]
        optional = len(parts) < len(get_args(annotation))
        return (parts[0] if len(parts) == 1 else Any), optional
    return annotation, False


def _option_label(method: Any, missing: str) -> str:
    """Return the label of a method in a dropdown. `missing`: why this machine does not support it, or empty."""
    name = f"{class_name(method.key)} (yours)" if is_own(method.key) else method.key
    return f"{name} {NOT_HERE}" if missing else name


def _simple_entry(field: str, widget: Any) -> Entry:
    """Return an entry whose value is that of its widget."""
    return Entry(field, widget, lambda: widget.value, lambda value: setattr(widget, "value", value))


def _dropdown(field: str, options: list[tuple[str, Any]], value: Any, common: dict[str, Any]) -> Entry:
    if all(value != item for _, item in options):
        options = [*options, (str(value), value)]  # a file may name a value that this version does not have
    return _simple_entry(field, widgets.Dropdown(options=options, value=value, **common))


def _optional_number(field: str, kind: Any, value: Any, common: dict[str, Any]) -> Entry:
    """Return an entry for an optional number: a text line, because number boxes cannot be empty."""
    box = widgets.Text(value=_as_text(value), placeholder="none", continuous_update=True, **common)

    def read() -> Any:
        text = box.value.strip()
        if not text:
            return None
        try:
            number = kind(text)
        except ValueError:
            expected = "a whole number" if kind is int else "a number"
            raise ValueError(f"must be {expected} or empty, got {text[:40]!r}") from None
        if not math.isfinite(number):
            raise ValueError(f"must be a finite number, got {text[:40]!r}")
        return number

    return Entry(field, box, read, lambda value: setattr(box, "value", _as_text(value)))


def _as_text(value: Any) -> str:
    """Return a number as text; an empty string for None."""
    return "" if value is None else value if isinstance(value, str) else repr(value)


def _text_entry(field: str, kind: Any, optional: bool, value: Any, common: dict[str, Any]) -> Entry:
    """Return an entry for lists, dicts and optional text: text is used as it is, everything else as JSON."""
    is_text = kind is str or not (get_origin(kind) in (list, tuple, dict) or kind in (list, tuple, dict, Any))

    def to_text(value: Any) -> str:
        return "" if value is None else value if is_text and isinstance(value, str) else json.dumps(value)

    make = widgets.Textarea if "\n" in to_text(value) else widgets.Text
    box = make(value=to_text(value), placeholder="none" if optional else "", continuous_update=True, **common)

    def read() -> Any:
        if optional and not box.value.strip():
            return None
        if is_text:
            return box.value
        try:
            return json.loads(box.value)
        except ValueError:
            raise ValueError(f"cannot read {' '.join(box.value.split())[:40]!r} as JSON") from None

    return Entry(field, box, read, lambda value: setattr(box, "value", to_text(value)))
