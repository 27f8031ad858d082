"""The tensors that a user's function, loss or object refers to, with a description of the place of each.

The search is bounded in depth and number of objects. It covers closures, partials, bound methods, default values,
module-level names that a function uses, attributes, lists and dicts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

MAX_OBJECTS, MAX_ITEMS, MAX_DEPTH = 5_000, 1_000, 6
_ATOMS = (int, float, complex, bool, str, bytes, type(None), type, BuiltinFunctionType, ModuleType)


def tensors_held(value: Any, owner: str) -> Iterator[tuple[str, Tensor]]:
    """Yield (place in words, tensor) for each tensor that `value`, called `owner`, refers to, the nearest first."""
    seen: dict[int, Any] = {}
    waiting = deque([("", value, 0)])
    while waiting and len(seen) < MAX_OBJECTS:
        place, part, depth = waiting.popleft()
        if isinstance(part, _ATOMS) or id(part) in seen:
            continue
        seen[id(part)] = part
        if isinstance(part, Tensor):
            yield (f"{place.lstrip('.')} of {owner}" if place else owner), part
        elif depth < MAX_DEPTH or isinstance(part, nn.Module):
            waiting.extend((inner, held, depth + 1) for inner, held in _parts(part, place))


def _parts(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Yield the objects that `value` refers to directly, with their places."""
    if isinstance(value, FunctionType):
        yield from _parts_of_function(value)
    elif isinstance(value, partial):
        yield place, value.func
        yield from ((f"args[{number}]", part) for number, part in enumerate(value.args))
        yield from ((name, part) for name, part in value.keywords.items())
    elif isinstance(value, MethodType):
        yield place, value.__self__
        yield place, value.__func__
    elif isinstance(value, Mapping):
        yield from ((f"{place}[{key!r}]", part) for key, part in list(value.items())[:MAX_ITEMS])
    elif isinstance(value, list | tuple | set | deque):
        yield from ((f"{place}[{number}]", part) for number, part in enumerate(list(value)[:MAX_ITEMS]))
    elif isinstance(value, nn.Module):
        own = {name: part for name, part in vars(value).items() if name not in _TABLES}
        tables = (value._parameters, value._buffers, value._modules, own)
        yield from ((f"{place}.{name}", part) for table in tables for name, part in table.items())
    elif isinstance(getattr(value, "__dict__", None), dict):
        yield from ((f"{place}.{name}", part) for name, part in vars(value).items())


_TABLES = frozenset(vars(nn.Module()))


def _parts_of_function(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the variables of a function's closure, its default values and the globals that it uses."""
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # nothing in it yet
            continue
    for name, part in (function.__kwdefaults__ or {}).items():
        yield name, part
    for part in function.__defaults__ or ():
        yield "a default value", part
    for name in code.co_names:
        if name in function.__globals__:
            yield name, function.__globals__[name]
