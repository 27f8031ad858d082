"""Rules that several workloads share. They import nothing heavy: the form calls them as you type."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from pydantic import BaseModel

from labkit.experiment.problem import Problem

FILE_SUFFIXES = (".parquet", ".txt", ".md", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".arrow", ".feather")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?")


def nearest_divisor(number: int, requested: int) -> int:
    """Return the divisor of `number` that is closest to `requested` (the smaller of two)."""
    return min((part for part in range(1, number + 1) if number % part == 0), key=lambda part: abs(part - requested))


def is_path(data: str) -> bool:
    """Return True if `data` names a file or folder rather than a data set of the hub."""
    return data.startswith((".", "/", "~")) or data.lower().endswith(FILE_SUFFIXES) or Path(data).expanduser().exists()


def extra_missing(field: str, package: str, extra: str, purpose: str) -> Iterator[Problem]:
    """Yield a problem if an optional package is not installed."""
    if find_spec(package) is None:
        yield Problem(field, f"{purpose} needs the package {package}: pip install 'labkit[{extra}]'")


def hub_data(field: str, data: str, builtin: str) -> Iterator[Problem]:
    """Yield the problems of a data set that is not built in: package, path, name.

    Nothing is opened and no server is contacted.
    """
    if is_path(data):
        if not Path(data).expanduser().exists():
            yield Problem(field, f"there is no file or folder {data}", builtin)
    elif not _HUB_ID.fullmatch(data):
        yield Problem(
            field, f"{data!r} is neither a path nor a data set's name like owner/name or owner/name:config", builtin
        )
    yield from extra_missing(field, "datasets", "hub", "a data set other than the built-in one")


def without_effect(options: BaseModel, names: Iterable[str], because: str) -> Iterator[Problem]:
    """Yield a warning for each of these options that was changed but does nothing here."""
    for name in names:
        if getattr(options, name) != type(options).model_fields[name].get_default(call_default_factory=True):
            yield Problem(f"workload.{name}", f"has no effect: {because}")
