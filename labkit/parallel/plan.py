"""Apply the plans by which modules say how an axis shards their parts (`Plan` in labkit.workloads.base)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

Style = Callable[[nn.Module, str], Any]
"""Shards a part of a module: takes the module and the dotted name of the part, empty for the module itself."""


def apply_plans(module: nn.Module, attribute: str, styles: Mapping[str, Style]) -> None:
    """Apply the plan that each part of `module` has in `attribute`, in place; ValueError for a style not in `styles`.

    An attribute of that name that is not a tuple belongs to another library.
    """
    for owner in list(module.modules()):
        plan: Any = getattr(owner, attribute, ())
        for name, style in plan if isinstance(plan, tuple) else ():
            if style not in styles:
                raise ValueError(f"labkit does not know how to shard {name} {style}, as the plan of the model asks")
            styles[style](owner, name)
