"""Methods that do not come with labkit: a class in a file, a module, an installed package, or a notebook cell.

    {"gradients.compression": {"method": "mine.py:Halves"}}            a file, or `package.module:Class`
    {"gradients.compression": {"method": "halves"}}                    an entry point of an installed package
    experiment.set({"gradients.compression": from_notebook(Halves)})   a cell: the experiment carries its source

An entry point is in the group `labkit.` followed by the knob (`labkit.gradients.compression`); whoever installed the
package trusts it as he trusts labkit. All other code is run in two places only: on the ranks of a run, and in the
notebook that defined the class. Everywhere else an experiment is data, and may have come from anywhere: there the base
class of the methods stands in for the class, its options are not checked, and the ranks check them before step 1.

A class of a cell has the key `cell:NAME@DIGEST` with the digest of its source, so that another version of the class is
another method and an older run still means what it meant.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import sha256
from importlib import metadata

CELL = "cell"
_KEY = re.compile(r"^(?P<where>[^:]+):(?P<name>[^\W\d]\w*)(?:@(?P<digest>[0-9a-f]{8}))?$")


@dataclass(frozen=True)
class OwnClass:
    """A class that this process has loaded, and its source if it comes from a cell."""

    implementation: type
    source: str = ""


_LOADED: dict[tuple[str, str], OwnClass] = {}
"""Classes that may run in this process, by knob and key, the latest last."""


def is_own(key: str) -> bool:
    """Return whether `key` has the form of a method that does not come with labkit."""
    return ":" in key and _KEY.match(key) is not None


def from_cell(key: str) -> bool:
    """Return whether `key` names a class of a notebook cell."""
    match = _KEY.match(key)
    return match is not None and match["where"] == CELL and match["digest"] is not None


def class_name(key: str) -> str:
    """Return the name of the class in a key, e.g. `Halves` of `mine.py:Halves`; the key itself if it is not own."""
    match = _KEY.match(key)
    return match["name"] if match else key


def cell_key(name: str, source: str) -> str:
    """Return the key of the class `name` that this source defines."""
    return f"{CELL}:{name}@{sha256(source.encode()).hexdigest()[:8]}"


def register(knob: str, key: str, own: OwnClass) -> None:
    """Let the class be used in this process: forms list it, its options and rules are checked."""
    _LOADED.pop((knob, key), None)
    _LOADED[knob, key] = own


def loaded(knob: str, key: str) -> OwnClass | None:
    """Return the class of a key if this process has loaded it for this knob."""
    return _LOADED.get((knob, key))


def source(knob: str, key: str) -> str:
    """Return the source of a class that was defined in a cell of this process; empty if there is none."""
    own = loaded(knob, key)
    return "" if own is None else own.source


def listed(knob: str) -> list[str]:
    """Return the keys of the classes that this process has loaded for a knob; of a redefined class the latest."""
    latest = {class_name(key): key for own_knob, key in _LOADED if own_knob == knob}
    return list(latest.values())


def entry_points(knob: str) -> dict[str, tuple[str, str]]:
    """Return the methods of installed packages for a knob: target `module:Class` and package, by name."""
    group = metadata.entry_points(group=f"labkit.{knob}")
    return {point.name: (point.value, point.dist.name if point.dist else "a package") for point in group}
