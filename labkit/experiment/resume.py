"""Resuming from a checkpoint: which local state can be reused, what makes the resume inexact, and what changed.

With any layout, a run that resumes from a checkpoint repeats the uninterrupted run bit for bit unless `notes` says why
not. The notes appear in the warnings of the run and in its summary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from labkit.experiment import own_methods
from labkit.experiment.checkpoint_files import Manifest
from labkit.experiment.schema import Experiment
from labkit.experiment.update_rule import update_rule

MAX_VALUE_LENGTH = 60
"""Maximum number of characters of a changed value that are shown."""
MAX_CHANGES = 20


def same_ranks(before: Experiment, now: Experiment) -> bool:
    """Return True if each rank can reuse its local state: the same layout, hosts and ways to combine gradients."""
    hosts = [getattr(experiment.launch.network, "hosts", 1) for experiment in (before, now)]
    return before.layout == now.layout and before.gradients == now.gradients and hosts[0] == hosts[1]


def notes(before: Experiment, now: Experiment, contents: Manifest) -> list[str]:
    """Return sentences about the run `now`, which resumes from a checkpoint of `before`; empty if there are none."""
    return [*_settings(before, now), *_code(before, now, contents), *_inexact(before, now, contents)]


def task_code(experiment: Experiment) -> str:
    """Return the SHA-256 of the file that defines a user's own task; empty if there is no such file."""
    workload, options = experiment.workload.load()
    code_of = getattr(workload, "code_of", None)
    return "" if code_of is None else str(code_of(options))


def carried_code(experiment: Experiment) -> str:
    """Describe the code outside labkit that a run of this experiment executes; empty if there is none."""
    workload, options = experiment.workload.load()
    carries = getattr(workload, "carries", None)
    parts = [str(carries(options))] if carries is not None else []
    for _, key in experiment.own_method_keys():
        name, source = own_methods.class_name(key), experiment.code.get(key)
        lines = len(source.splitlines()) if source is not None else 0
        parts.append(f"the class {name} in {lines} lines of source text" if lines else f"the class at {key}")
    return " and ".join(parts)


def _settings(before: Experiment, now: Experiment) -> Iterator[str]:
    """Note the settings that differ from those of the checkpoint."""
    old, new = dict(_flat(before.to_dict())), dict(_flat(now.to_dict()))
    changed = [
        f"{field} {_shown(new.get(field))} (was {_shown(old.get(field))})"
        for field in sorted(old.keys() | new.keys())
        if old.get(field) != new.get(field) and field not in ("name", "schema_version")
        if not field.startswith("code.")  # the key of a method changes with its source
    ]
    more = f" and {len(changed) - MAX_CHANGES} more" if len(changed) > MAX_CHANGES else ""
    if changed:
        yield f"it was resumed with other settings: {', '.join(changed[:MAX_CHANGES])}{more}"


def _flat(section: dict[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of every setting below `section`."""
    for name, value in section.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{start}{name}.")
        else:
            yield f"{start}{name}", value


def _shown(value: Any) -> str:
    """Return a value as text, cut to MOST_VALUE characters."""
    text = "empty" if value is None else str(value)
    return text if len(text) <= MAX_VALUE_LENGTH else f"{text[: MAX_VALUE_LENGTH - 1]}…"


def _code(before: Experiment, now: Experiment, contents: Manifest) -> Iterator[str]:
    """Note that the user's task has changed since the checkpoint."""
    if contents.code and before.workload == now.workload and task_code(now) != contents.code:
        where = now.workload.options.get("path") or "the task"
        yield f"the code of {where} has changed since the checkpoint it was resumed from"


def _inexact(before: Experiment, now: Experiment, contents: Manifest) -> Iterator[str]:
    """Note each reason why the resumed run is not exact."""
    kept = contents.ranks == now.layout.world_size and same_ranks(before, now)
    compression = now.gradients.compression
    compressor, options = compression.load()
    remembers = compressor.describe_local_state(options)
    if remembers and not kept:
        yield (
            f"the resume is not exact: {compression.method} keeps on each rank {remembers}, which belongs to the ranks "
            f"and the layout that wrote the checkpoint, so it began from zero"
        )
    rule, options = update_rule(now).load()
    why = rule.inexact_resume(options, contents.unscheduled, kept)
    if why:
        yield f"the resume is not exact: {why}"
    if now.training.shares == "speed" and now.layout.world_size > 1:
        yield "the resume is not exact: training.shares=speed follows measured times, so no two runs are alike"
