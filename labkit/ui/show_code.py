"""Writes the code of a notebook cell that runs an experiment without widgets."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from labkit.experiment import Experiment
from labkit.experiment.choice import Choice

_ENDING = """
run = launch(experiment).wait()
plot_overview(run, compare([run], baseline=run.summary()["baseline_run_id"]))
"""


def code(experiment: Experiment) -> str:
    """Return Python code that builds `experiment`, launches it, waits for it and draws the result.

    Only settings that differ from the defaults are written out.
    """
    classes: set[str] = {"Experiment"}
    built = _constructor_call(experiment, classes, 0, keep=("training",))
    imports = [
        f"from labkit.experiment import {', '.join(sorted(classes))}",
        "from labkit.launch import launch",
        "from labkit.plots import plot_overview",
        "from labkit.runs.compare import compare",
    ]
    return "\n".join(imports) + f"\n\nexperiment = {built}\n" + _ENDING


def _constructor_call(model: BaseModel, classes: set[str], depth: int, keep: tuple[str, ...] = ()) -> str:
    """Return a constructor call with the fields that differ from the defaults, and those in `keep`."""
    kind = type(model)
    classes.add(kind.__name__)
    values = {name: getattr(model, name) for name in kind.model_fields}
    defaults: dict[str, Any] = {
        name: info.get_default(call_default_factory=True)
        for name, info in kind.model_fields.items()
        if not info.is_required()
    }
    if isinstance(model, Choice):
        values |= model.options
        defaults |= type(model)(**{model.SELECTOR: model.key}).options
        # the name of the method is kept, because options without it would be those of another method
        keep = (*keep, model.SELECTOR)
    parts = []
    for name, value in values.items():
        if name in keep or name not in defaults or value != defaults[name]:
            nested = isinstance(value, BaseModel)
            parts.append(f"{name}={_constructor_call(value, classes, depth + 1) if nested else repr(value)}")
    flat = f"{kind.__name__}({', '.join(parts)})"
    if len(flat) + 4 * depth <= 90:
        return flat
    inner = "".join(f"\n{'    ' * (depth + 1)}{part}," for part in parts)
    return f"{kind.__name__}({inner}\n{'    ' * depth})"
