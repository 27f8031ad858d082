"""Find a function by `module:function` or `file.py:function`: first without running anything, later by importing it."""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any


def why_not(path: str) -> str:
    """Return in a clause why `path` names no function; empty if it seems to. Reads files, imports and runs nothing."""
    where, _, name = path.rpartition(":")
    if not where or not name.isidentifier():
        return f"{path!r} is not of the form module:function or file.py:function"
    if where.endswith(".py"):
        file: Path | None = Path(where).expanduser()
        if file is not None and not file.is_file():
            return f"there is no file {where}"
    else:
        if not all(part.isidentifier() for part in where.split(".")):
            return f"{where!r} is not a module name"
        importable, file = _module_file(where)
        if not importable:
            return f"there is no module {where} that can be imported"
    if file is None or file.suffix != ".py":  # built in or compiled: cannot be parsed
        return ""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError) as error:
        return f"{file.name} is not Python: {getattr(error, 'msg', error)} (line {getattr(error, 'lineno', '?')})"
    except OSError as error:
        return f"cannot read {where}: {error.strerror}"
    return "" if name in _top_level_names(tree) else f"{where} does not define {name}"


def file_of(path: str) -> Path | None:
    """Return the file that defines the function at `path`; None if that is not a Python file. Runs nothing."""
    where = path.rpartition(":")[0]
    file = Path(where).expanduser() if where.endswith(".py") else _module_file(where)[1]
    return file if file is not None and file.suffix == ".py" else None


def load(path: str) -> Callable[..., Any]:
    """Import the module or file and return the function; raises ValueError if it does not exist."""
    reason = why_not(path)
    if reason:
        raise ValueError(reason)
    where, _, name = path.rpartition(":")
    if where.endswith(".py"):
        file = Path(where).expanduser().resolve()
        spec = importlib.util.spec_from_file_location(file.stem, file)
        if spec is None or spec.loader is None:
            raise ValueError(f"cannot import {where}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[file.stem] = module
        sys.path.insert(0, str(file.parent))  # so that the file can import its neighbours, as a script could
        spec.loader.exec_module(module)
    else:
        # `why_not` searched here; only for this import, so that later imports of libraries do not search here.
        here = os.getcwd()
        sys.path.insert(0, here)
        try:
            module = importlib.import_module(where)
        finally:
            sys.path.remove(here)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{name} in {where} is not a function")
    return function


def _module_file(module: str) -> tuple[bool, Path | None]:
    """Return whether the module exists, and its file. `importlib.util.find_spec("a.b")` would import and run `a`."""
    places: list[str] | None = [os.getcwd(), *sys.path]
    origin: str | None = None
    if module in sys.builtin_module_names:
        return True, None
    for part in module.split("."):
        spec = PathFinder.find_spec(part, places)
        if spec is None:
            return False, None
        places, origin = list(spec.submodule_search_locations or []), spec.origin
    return True, Path(origin) if origin else None


def _top_level_names(tree: ast.Module) -> set[str]:
    """Return the names that a module defines or imports."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name.partition(".")[0])
    return names
