"""All pictures that the traced updates of some runs give, in the order in which one would look at them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from labkit.plots import traced
from labkit.plots.experts import experts
from labkit.plots.memory import memory
from labkit.plots.picture import Picture
from labkit.plots.schedules import schedules
from labkit.plots.shown import shown
from labkit.plots.timeline import timeline
from labkit.plots.traffic import communication


def closeups(runs: Iterable[Any] | Any) -> list[Picture]:
    """Memory always; traffic where ranks talk; schedules where two can be compared; each pipeline, each mixture."""
    many = [one for one in shown(runs) if one.data.memory and not one.is_ceiling]
    pipelines = [one for one in many if traced.bubble_of(one) is not None]
    talking = [one for one in many if one.data.traffic]
    found = [memory(many)] if many else []
    if talking:
        found.append(communication(talking))
    if len(pipelines) > 1:
        found.append(schedules(pipelines))
    found += [timeline(one) for one in pipelines]
    return found + [experts(one) for one in many if any(load.sum() for load in one.data.experts.values())]
