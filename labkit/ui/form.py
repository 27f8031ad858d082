"""The form of settings, generated from the fields of Experiment and the registries.

The knobs of the lesson come first, everything else is under Advanced. No method is mentioned by name here: a new line
in a registry, or a new field with its docstring, appears automatically.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ipywidgets as widgets
from pydantic import BaseModel

from labkit.experiment import Experiment, ExperimentError, Problem
from labkit.experiment.choice import Choice
from labkit.experiment.registry import ROOMS, Options, registry
from labkit.experiment.rules import CHOICES, UNAVAILABLE
from labkit.ui import entry as entries
from labkit.ui.entry import Entry

_CHOICE_OF = {field: knob for knob, field in CHOICES.items()}
_HIDDEN = ("schema_version", "code")
DEFAULT_KNOBS = (
    "workload.name",
    "layout.dp_replicate",
    "training.steps",
    "training.global_batch",
    "gradients.accumulation",
    "optimizer.lr",
)


class ExperimentForm:
    """Widgets for every setting. `value` is the experiment they describe; `problems` are the reasons why it cannot run.

    `knobs` are dotted fields or whole sections, which are shown first; unknown ones raise ExperimentError.
    """

    def __init__(self, experiment: Experiment, knobs: Sequence[str] | None = None) -> None:
        self.widget = widgets.VBox(layout={"width": "100%"})
        self.problems: list[Problem] = []
        """Every reason why `value` cannot run here, and every entry that cannot be read."""
        self.warnings: list[Problem] = []
        self._callbacks: list[Callable[[], None]] = []
        self._muted = False
        self._value: Experiment = experiment
        self._base = experiment
        self._knobs = list(knobs) if knobs is not None else _default_knobs(experiment)
        self.entries: dict[str, Entry] = {}
        """Entries by dotted field."""
        self._open: int | None = None
        for knob in self._knobs:
            experiment.get(knob)
        self._build(experiment)

    # -- value ------------------------------------------------------------------------------------------------------

    @property
    def value(self) -> Experiment:
        """The experiment that the form describes; ExperimentError if an entry is invalid."""
        data, unreadable = self._read_entries()
        if unreadable:
            raise ExperimentError(unreadable)
        return Experiment.from_dict(data)

    @value.setter
    def value(self, experiment: Experiment) -> None:
        self._build(experiment)
        self._notify()

    def set(self, field: str, value: Any) -> None:
        """Set one entry, like a user. ExperimentError if there is no such field."""
        if field not in self.entries:
            from labkit.experiment.problem import unknown

            raise ExperimentError([unknown(field, field, self.entries)])
        self.entries[field].write(value)

    def apply_hint(self, problem: Problem) -> None:
        """Set the entry of a problem to the legal value that it suggests, if there is one."""
        field = self.hint_field(problem)
        if field is not None:
            self.entries[field].write(_as_value(problem.nearest))

    def hint_field(self, problem: Problem) -> str | None:
        """Return the field that the hint of a problem would change; None if there is none."""
        if problem.nearest is None:
            return None
        field = "layout.dp_replicate" if problem.field == "layout" else problem.field
        return field if field in self.entries else None

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call `callback()` after every change, with `problems` up to date."""
        self._callbacks.append(callback)

    # -- entries ----------------------------------------------------------------------------------------------------

    def _read_entries(self) -> tuple[dict[str, Any], list[Problem]]:
        """Return the values of all entries as a nested dictionary, and a problem for each unreadable entry."""
        data = self._base.to_dict()
        unreadable: list[Problem] = []
        for name in [name for name, part in self._base if isinstance(part, BaseModel)]:
            data[name] = {}
        for field, entry in self.entries.items():
            *path, last = field.split(".")
            section: Any = data
            for part in path:
                # a nested section that is switched off is None, and its entries are skipped
                section = section.setdefault(part, {}) if isinstance(section, dict) else None
            if not isinstance(section, dict):
                continue
            try:
                section[last] = entry.read()
            except ValueError as error:
                unreadable.append(Problem(field, str(error)))
        self._keep_unchecked_options(data)
        return data, unreadable

    def _keep_unchecked_options(self, data: dict[str, Any]) -> None:
        """Put back the options of own methods whose class this process must not load: they have no entries."""
        for prefix, (model, _) in ((name.rsplit(".", 1)[0], built) for name, built in self._rebuilt_by.items()):
            choice: Any = self._base.get(prefix)
            section: Any = data
            for part in prefix.split("."):
                section = section.get(part, {})
            method = model.methods()[choice.key]
            if section.get(model.SELECTOR) == choice.key and not method.is_loaded:
                section.update(choice.options)

    def _changed(self, field: str) -> None:
        """Update dependent entries, problems and listeners after a change of `field`."""
        if self._muted:
            return
        if field in ("training.steps", "training.epochs"):
            self._clear_alternative(field)
        if field in self._rebuilt_by:
            self._rebuild_options(field)
        self._notify()

    def _clear_alternative(self, field: str) -> None:
        """Clear the number of epochs if steps are entered, and vice versa, because they exclude each other."""
        alternative = "training.epochs" if field == "training.steps" else "training.steps"
        if alternative in self.entries and self.entries[field].widget.value.strip():
            self._muted = True
            try:
                self.entries[alternative].write(None)
            finally:
                self._muted = False

    def _notify(self) -> None:
        """Update `problems` and `warnings`, and call the callbacks."""
        try:
            self._value = self.value
            self.problems = self._value.problems()
            self.warnings = self._value.warnings()
        except ExperimentError as error:
            self.problems, self.warnings = error.problems, []
        for callback in list(self._callbacks):
            callback()

    def _build(self, experiment: Experiment) -> None:
        """Create all entries for an experiment: knobs first, then one accordion per section under Advanced."""
        self._base = self._value = experiment
        self.entries = {}
        self._rebuilt_by: dict[str, tuple[type[Choice], Any]] = {}
        sections: dict[str, list[Any]] = {}
        knobs: list[Any] = []
        for name, info in Experiment.model_fields.items():
            if name in _HIDDEN:
                continue
            part = getattr(experiment, name)
            if isinstance(part, BaseModel):
                sections[name] = list(self._section(name, type(part), part, knobs))
            else:
                sections.setdefault("name", []).append(self._leaf(name, info, part))
        order = {field: index for index, field in enumerate(self._knobs)}
        knobs.sort(key=lambda pair: order[pair[0]])
        advanced = {name: rows for name, rows in sections.items() if rows}
        titles = {name: "Run" if name == "name" else name.capitalize() for name in advanced}
        inner = [part for name, rows in advanced.items() for part in accordion(titles[name], rows)]
        outer = accordion("Advanced", inner)
        outer[1].add_class("labkit-advanced")
        self.widget.children = [*(row for _, row in knobs), *outer]
        self._update_problems()

    def _update_problems(self) -> None:
        """Update `problems` and `warnings` without calling the callbacks."""
        callbacks, self._callbacks = self._callbacks, []
        try:
            self._notify()
        finally:
            self._callbacks = callbacks

    def _section(self, prefix: str, model: type[BaseModel], part: Any, knobs: list[Any]) -> Iterator[Any]:
        """Yield the rows of a section; the rows of knobs are appended to `knobs` instead."""
        for name, info in model.model_fields.items():
            field = f"{prefix}.{name}"
            inner = _model(info.annotation)
            if inner is not None and not _optional(info.annotation):
                yield from self._section(field, inner, getattr(part, name), knobs)
                continue
            if inner is not None:
                row = self._optional_section(field, inner, info, getattr(part, name))
            else:
                row = self._leaf(field, info, getattr(part, name))
            knob = next((name for name in (field, prefix) if name in self._knobs), None)
            if knob is not None:
                knobs.append((knob, row))
            else:
                yield row
        if issubclass(model, Choice):
            selector = f"{prefix}.{model.SELECTOR}"
            box = widgets.VBox()
            self._rebuilt_by[selector] = (model, box)
            self._fill_options(prefix, model, box, part.options)
            if prefix in self._knobs or f"{prefix}.options" in self._knobs:
                knobs.append((prefix if prefix in self._knobs else f"{prefix}.options", box))
            else:
                yield box

    def _leaf(self, field: str, info: Any, value: Any) -> Any:
        """Create the entry of a leaf field, and return its widget."""
        choice = _CHOICE_OF.get(field)
        entry = entries.entry(field, info, value, registry(choice) if choice in ROOMS else None)
        if value == info.get_default():
            _disable_if_unavailable(field, entry.widget)
        self._register(entry)
        return entry.widget

    def _register(self, entry: Entry) -> None:
        """Add an entry to the form, and observe its changes."""
        self.entries[entry.field] = entry
        entry.widget.style.description_width = "150px"
        entry.widget.layout.width = "auto"
        entry.observe(lambda _change: self._changed(entry.field))

    def _optional_section(self, field: str, model: type[BaseModel], info: Any, part: Any) -> Any:
        """Return the widgets of a section that may be absent: a switch, and its settings while it is on."""
        box = widgets.VBox()
        switch = widgets.Checkbox(
            value=part is not None, description=entries.label(field), tooltip=entries.tooltip(field, info), indent=True
        )

        if part is None:
            _disable_if_unavailable(field, switch)

        def fill(part: Any) -> None:
            for stale in [name for name in self.entries if name.startswith(f"{field}.")]:
                del self.entries[stale]
            if not switch.value:
                box.children = []
                return
            values = {
                name: getattr(part, name) if part else _initial(inner) for name, inner in model.model_fields.items()
            }
            box.children = [self._leaf(f"{field}.{name}", model.model_fields[name], values[name]) for name in values]

        self.entries[field] = Entry(
            field,
            switch,
            lambda: {} if switch.value else None,
            lambda value: setattr(switch, "value", value is not None),
        )

        def switched(_change: Any) -> None:
            fill(None)
            self._changed(field)

        fill(part)
        switch.observe(switched, names="value")
        return widgets.VBox([switch, box])

    def _rebuild_options(self, selector: str) -> None:
        """Replace the options after another method was chosen."""
        model, box = self._rebuilt_by[selector]
        prefix = selector.rsplit(".", 1)[0]
        self._fill_options(prefix, model, box, {})

    def _fill_options(self, prefix: str, model: type[Choice], box: Any, values: dict[str, Any]) -> None:
        """Replace the options in `box` by those of the chosen method."""
        fixed = {f"{prefix}.{name}" for name in model.model_fields}
        nested = {name for name in self.entries if name.startswith(f"{prefix}.")}
        for stale in nested - fixed:
            del self.entries[stale]
        key = self.entries[f"{prefix}.{model.SELECTOR}"].read()
        methods = model.methods()
        rows = []
        if key in methods and methods[key].is_loaded:
            options: type[Options] = methods.options(key)
            for name, info in options.model_fields.items():
                value = values.get(name, info.get_default(call_default_factory=True))
                rows.append(self._leaf(f"{prefix}.{name}", info, _initial(info) if info.is_required() else value))
        box.children = rows


def accordion(title: str, rows: Sequence[Any]) -> list[Any]:
    """Return a button that shows and hides rows, and their box.

    The Accordion of ipywidgets cannot be reached with the keyboard.
    """
    box = widgets.VBox(list(rows), layout={"display": "none", "padding": "0 0 6px 8px"})
    button = widgets.Button(description=f"▸ {title}", tooltip=f"Show {title}", layout={"width": "auto"})
    button.add_class("labkit-fold")

    def turn(_button: Any) -> None:
        hidden = box.layout.display == "none"
        box.layout.display = "" if hidden else "none"
        button.description = f"{'▾' if hidden else '▸'} {title}"
        button.tooltip = f"{'Hide' if hidden else 'Show'} {title}"

    button.on_click(turn)
    return [button, box]


def _disable_if_unavailable(field: str, widget: Any) -> None:
    """Disable a setting that this machine does not support, and explain it in the tooltip."""
    reason = UNAVAILABLE[field]() if field in UNAVAILABLE else ""
    if reason:
        widget.disabled = True
        widget.description = f"{widget.description} {entries.NOT_HERE}"
        widget.tooltip = f"{widget.tooltip} Unavailable on this machine: {reason}."


def _default_knobs(experiment: Experiment) -> list[str]:
    """Return the default knobs, with epochs in place of steps if the experiment has epochs."""
    length = "training.steps" if experiment.training.steps else "training.epochs"
    return [length if field == "training.steps" else field for field in DEFAULT_KNOBS]


def _model(annotation: Any) -> type[BaseModel] | None:
    """Return the model class of an annotation; None if it is not a model."""
    kind, _ = entries.unwrap_optional(annotation)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _optional(annotation: Any) -> bool:
    """Return whether an annotation allows None."""
    return entries.unwrap_optional(annotation)[1]


def _initial(info: Any) -> Any:
    """Return the default of a field, or a legal initial value if it has none."""
    if not info.is_required():
        return info.get_default(call_default_factory=True)
    kind, optional = entries.unwrap_optional(info.annotation)
    bounds = [
        getattr(part, name) for part in info.metadata for name in ("ge", "gt") if getattr(part, name, None) is not None
    ]
    if optional or kind not in (int, float, str, bool):
        return "" if kind is str else None
    return kind(max([100, *bounds])) if kind in (int, float) else kind()


def _as_value(nearest: Any) -> Any:
    """Return a hint as a value: strings such as `"false"` and `"null"` are parsed as JSON."""
    if isinstance(nearest, str):
        try:
            return json.loads(nearest)
        except ValueError:
            return nearest
    return nearest
