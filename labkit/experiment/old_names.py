"""Settings under the names that they had until version 0.1: they are read, and a warning says the new ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from labkit.experiment.layout import Layout

MOMENTUM = 0.9
"""Default momentum of SGD."""
PIPEDREAM = "pipedream"
DEFAULT: str = Layout.model_fields["schedule"].default
_OF_PIPEDREAM = {"stash": "weight_stashing", "predict": "weight_prediction"}
"""Settings of the layout by the names that they had as options of the update rule."""


def with_new_names(data: dict[str, Any], assigned: Iterable[str]) -> dict[str, Any]:
    """Return the data of an experiment with settings that were assigned by an old name under their new one."""
    fields = set(assigned)
    if "optimizer.momentum" in fields and "optimizer.beta1" not in fields and isinstance(data["optimizer"], dict):
        data = data | {"optimizer": beta1_from_momentum(data["optimizer"])}
    chooses_rule = fields & {"gradients", "gradients.update", "gradients.update.method"}
    return _without_pipedream(data) if chooses_rule and not fields & {"layout", "layout.schedule"} else data


def _without_pipedream(data: dict[str, Any]) -> dict[str, Any]:
    """Return the data with the default schedule if another update rule was chosen in the place of PipeDream."""
    update, layout = _update_fields(data), _layout_fields(data.get("layout", {}))
    if update is None or layout is None or layout.get("schedule") != PIPEDREAM or update.get("method") == PIPEDREAM:
        return data
    text = (
        "PipeDream is a pipeline schedule, not an update rule: choosing another rule sets layout.schedule to "
        f"{DEFAULT}; set it yourself"
    )
    warnings.warn(text, FutureWarning, stacklevel=3)
    return data | {"layout": layout | {"schedule": DEFAULT}}


def beta1_from_momentum(optimizer: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with AdamW's `momentum`, as its beta1 was called, under its new name."""
    momentum = optimizer.get("momentum", MOMENTUM)
    if optimizer.get("name", "adamw") != "adamw" or momentum == MOMENTUM:
        return optimizer
    warnings.warn("optimizer.momentum is that of SGD; for AdamW set optimizer.beta1", FutureWarning, stacklevel=2)
    return optimizer | {"beta1": momentum, "momentum": MOMENTUM}


def schedule_from_update_rule(data: dict[str, Any]) -> dict[str, Any]:
    """Return the data of an experiment with PipeDream, which was an update rule, as the schedule of the layout."""
    update, layout = _update_fields(data), _layout_fields(data.get("layout", {}))
    if update is None or layout is None:
        return data
    method = update.get("method", "synchronous")
    moved = {new: update[old] for old, new in _OF_PIPEDREAM.items() if old in update}
    is_schedule = layout.get("schedule") == PIPEDREAM and method == "synchronous"
    if method != PIPEDREAM and not (is_schedule and moved):
        return data
    text = (
        "PipeDream is a pipeline schedule, not an update rule: set layout.schedule=pipedream (stash and predict are "
        "layout.weight_stashing and layout.weight_prediction)"
    )
    warnings.warn(text, FutureWarning, stacklevel=2)
    rest = {name: value for name, value in update.items() if name != "method" and name not in _OF_PIPEDREAM}
    return data | {
        "layout": layout | {"schedule": PIPEDREAM} | moved,
        "gradients": data["gradients"] | {"update": rest},
    }


def _update_fields(data: dict[str, Any]) -> dict[str, Any] | None:
    """Return the fields of the update rule; None if there are none or they are refused anyway."""
    gradients = data.get("gradients")
    update = gradients.get("update") if isinstance(gradients, dict) else None
    return update if isinstance(update, dict) else None


def _layout_fields(layout: Any) -> dict[str, Any] | None:
    """Return the fields of a layout in any form that an experiment accepts; None if it is refused anyway."""
    if isinstance(layout, Layout):
        return layout.model_dump()
    try:
        fields = Layout.read_short_form(layout)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) else None
