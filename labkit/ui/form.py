"""The panel of settings, made from the Experiment's own fields and the registries.

The knobs of the lesson come first, everything else under Advanced. Nothing here knows a method by name: a new line in
a registry, or a new field with its docstring, shows up by itself.
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

_KNOB_OF = {field: knob for knob, field in CHOICES.items()} | {"layout.schedule": "layout.schedule"}
_HIDDEN = ("schema_version",)
DEFAULT_KNOBS = (
    "workload.name",
    "layout.dp_replicate",
    "training.steps",
    "training.global_batch",
    "gradients.accumulation",
    "optimizer.lr",
)


class ExperimentForm:
    """Widgets for every setting. `value` is the experiment they describe; `problems` says why it cannot run.

    `knobs` are dotted fields, or whole sections; unknown ones raise ExperimentError.
    """

    def __init__(self, experiment: Experiment, knobs: Sequence[str] | None = None) -> None:
        self.widget = widgets.VBox(layout={"width": "100%"})
        self.problems: list[Problem] = []
        """Every reason why `value` cannot run here, and every entry that cannot be read."""
        self.warnings: list[Problem] = []
        self._callbacks: list[Callable[[], None]] = []
        self._quiet = False
        self._value: Experiment = experiment
        self._base = experiment
        self._wanted = list(knobs) if knobs is not None else _default_knobs(experiment)
        self.entries: dict[str, Entry] = {}
        """By dotted field."""
        self._open: int | None = None
        for knob in self._wanted:
            experiment.get(knob)
        self._build(experiment)

    # -- value ------------------------------------------------------------------------------------------------------

    @property
    def value(self) -> Experiment:
        """The experiment that the form describes; ExperimentError where an entry is not legal."""
        data, unread = self._collect()
        if unread:
            raise ExperimentError(unread)
        return Experiment.from_dict(data)

    @value.setter
    def value(self, experiment: Experiment) -> None:
        self._build(experiment)
        self._tell()

    def set(self, field: str, value: Any) -> None:
        """Set one entry, as a person would; ExperimentError if there is no such field."""
        if field not in self.entries:
            from labkit.experiment.problem import unknown

            raise ExperimentError([unknown(field, field, self.entries)])
        self.entries[field].write(value)

    def use(self, problem: Problem) -> None:
        """Follow a problem's hint."""
        target = self.target(problem)
        if target is not None:
            self.entries[target].write(_as_value(problem.nearest))

    def target(self, problem: Problem) -> str | None:
        """The entry that a problem's hint would change; None if there is none."""
        if problem.nearest is None:
            return None
        field = "layout.dp_replicate" if problem.field == "layout" else problem.field
        return field if field in self.entries else None

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call `callback()` after every change, with `problems` up to date."""
        self._callbacks.append(callback)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _collect(self) -> tuple[dict[str, Any], list[Problem]]:
        data = self._base.to_dict()
        unread: list[Problem] = []
        for section in [name for name, part in self._base if isinstance(part, BaseModel)]:
            data[section] = {}
        for field, one in self.entries.items():
            *path, last = field.split(".")
            place: Any = data
            for part in path:
                # a nested section that is switched off is None, and so are its entries' places
                place = place.setdefault(part, {}) if isinstance(place, dict) else None
            if not isinstance(place, dict):
                continue
            try:
                place[last] = one.read()
            except ValueError as error:
                unread.append(Problem(field, str(error)))
        return data, unread

    def _changed(self, field: str) -> None:
        if self._quiet:
            return
        if field in ("training.steps", "training.epochs"):
            self._exclude(field)
        if field in self._rebuilt_by:
            self._rebuild_options(field)
        self._tell()

    def _exclude(self, field: str) -> None:
        """Steps and epochs exclude each other: the one that is typed clears the other."""
        other = "training.epochs" if field == "training.steps" else "training.steps"
        if other in self.entries and self.entries[field].widget.value.strip():
            self._quiet = True
            try:
                self.entries[other].write(None)
            finally:
                self._quiet = False

    def _tell(self) -> None:
        try:
            self._value = self.value
            self.problems = self._value.problems()
            self.warnings = self._value.warnings()
        except ExperimentError as error:
            self.problems, self.warnings = error.problems, []
        for callback in list(self._callbacks):
            callback()

    def _build(self, experiment: Experiment) -> None:
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
        order = {field: at for at, field in enumerate(self._wanted)}
        knobs.sort(key=lambda pair: order[pair[0]])
        advanced = {name: rows for name, rows in sections.items() if rows}
        titles = {name: "Run" if name == "name" else name.capitalize() for name in advanced}
        inner = [part for name, rows in advanced.items() for part in fold(titles[name], rows)]
        outer = fold("Advanced", inner)
        outer[1].add_class("labkit-advanced")
        self.widget.children = [*(row for _, row in knobs), *outer]
        self._refresh_problems_only()

    def _refresh_problems_only(self) -> None:
        callbacks, self._callbacks = self._callbacks, []
        try:
            self._tell()
        finally:
            self._callbacks = callbacks

    def _section(self, prefix: str, model: type[BaseModel], part: Any, knobs: list[Any]) -> Iterator[Any]:
        """Rows of a section; a knob's row goes to `knobs` instead."""
        for name, info in model.model_fields.items():
            field = f"{prefix}.{name}"
            inner = _model(info.annotation)
            if inner is not None and not _optional(info.annotation):
                yield from self._section(field, inner, getattr(part, name), knobs)
                continue
            if inner is not None:
                row = self._switched(field, inner, info, getattr(part, name))
            else:
                row = self._leaf(field, info, getattr(part, name))
            wanted = next((one for one in (field, prefix) if one in self._wanted), None)
            if wanted is not None:
                knobs.append((wanted, row))
            else:
                yield row
        if issubclass(model, Choice):
            selector = f"{prefix}.{model.SELECTOR}"
            box = widgets.VBox()
            self._rebuilt_by[selector] = (model, box)
            self._fill_options(prefix, model, box, part.options)
            if prefix in self._wanted or f"{prefix}.options" in self._wanted:
                knobs.append((prefix if prefix in self._wanted else f"{prefix}.options", box))
            else:
                yield box

    def _leaf(self, field: str, info: Any, value: Any) -> Any:
        knob = _KNOB_OF.get(field)
        one = entries.entry(field, info, value, registry(knob) if knob in ROOMS else None)
        axes = registry("layout.axes")
        axis = field.removeprefix("layout.")
        if field.startswith("layout.") and axis in axes and not axes[axis].available and value == 1:
            one.widget.disabled = True
            one.widget.description = f"{axis} {entries.NOT_YET}"
        if value == info.get_default():
            _grey(field, one.widget)
        self._add(one)
        return one.widget

    def _add(self, one: Entry) -> None:
        self.entries[one.field] = one
        one.widget.style.description_width = "150px"
        one.widget.layout.width = "auto"
        one.observe(lambda _change: self._changed(one.field))

    def _switched(self, field: str, model: type[BaseModel], info: Any, part: Any) -> Any:
        """A section that may be absent: a switch, and its settings while it is on."""
        box = widgets.VBox()
        switch = widgets.Checkbox(
            value=part is not None, description=entries.label(field), tooltip=entries.tooltip(field, info), indent=True
        )

        if part is None:
            _grey(field, switch)

        def fill(part: Any) -> None:
            for known in [name for name in self.entries if name.startswith(f"{field}.")]:
                del self.entries[known]
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
        model, box = self._rebuilt_by[selector]
        prefix = selector.rsplit(".", 1)[0]
        self._fill_options(prefix, model, box, {})

    def _fill_options(self, prefix: str, model: type[Choice], box: Any, values: dict[str, Any]) -> None:
        """The options of the chosen method, in place of those of the method chosen before."""
        fixed = {f"{prefix}.{name}" for name in model.model_fields}
        nested = {name for name in self.entries if name.startswith(f"{prefix}.")}
        for known in nested - fixed:
            del self.entries[known]
        key = self.entries[f"{prefix}.{model.SELECTOR}"].read()
        methods = model.methods()
        rows = []
        if key in methods and methods[key].available:
            options: type[Options] = methods.options(key)
            for name, info in options.model_fields.items():
                value = values.get(name, info.get_default(call_default_factory=True))
                rows.append(self._leaf(f"{prefix}.{name}", info, _initial(info) if info.is_required() else value))
        box.children = rows


def fold(title: str, rows: Sequence[Any]) -> list[Any]:
    """A button that shows and hides rows (ipywidgets' own Accordion cannot be reached with the keyboard)."""
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


def _grey(field: str, widget: Any) -> None:
    """Switch off what this machine cannot offer; the tooltip tells why."""
    reason = UNAVAILABLE[field]() if field in UNAVAILABLE else ""
    if reason:
        widget.disabled = True
        widget.description = f"{widget.description} {entries.NOT_HERE}"
        widget.tooltip = f"{widget.tooltip} Not on this machine: {reason}."


def _default_knobs(experiment: Experiment) -> list[str]:
    length = "training.steps" if experiment.training.steps else "training.epochs"
    return [length if field == "training.steps" else field for field in DEFAULT_KNOBS]


def _model(annotation: Any) -> type[BaseModel] | None:
    kind, _ = entries._unwrap(annotation)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _optional(annotation: Any) -> bool:
    return entries._unwrap(annotation)[1]


def _initial(info: Any) -> Any:
    """Something legal to begin with for a field that has no default."""
    if not info.is_required():
        return info.get_default(call_default_factory=True)
    kind, optional = entries._unwrap(info.annotation)
    bounds = [
        getattr(part, name) for part in info.metadata for name in ("ge", "gt") if getattr(part, name, None) is not None
    ]
    if optional or kind not in (int, float, str, bool):
        return "" if kind is str else None
    return kind(max([100, *bounds])) if kind in (int, float) else kind()


def _as_value(nearest: Any) -> Any:
    """A hint as a value: `"false"` and `"null"` are written for people."""
    if isinstance(nearest, str):
        try:
            return json.loads(nearest)
        except ValueError:
            return nearest
    return nearest
