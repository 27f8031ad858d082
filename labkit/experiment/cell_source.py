"""Send a function from a notebook cell to the ranks as source text.

Text can be read, stored in the experiment's JSON and shown again; a pickle could not, and would run code when it is
loaded. The price is that the function must be self-contained. That is checked here by parsing the text, never by
running it.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import linecache
import symtable
import sys
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_GIVEN = {*dir(builtins), "__name__", "__file__", "__doc__", "__builtins__", "__class__"}


class NotSelfContainedError(ValueError):
    """Raised if a function or text cannot be sent to the ranks; the message says in one sentence why and what to do."""


def self_contained_source(function: Callable[..., Any]) -> str:
    """Return the source of `function`; raises NotSelfContainedError if it depends on anything outside of it."""
    if not isinstance(function, types.FunctionType):
        kind = "a method" if isinstance(function, types.MethodType) else f"a {type(function).__name__}"
        raise NotSelfContainedError(f"only a plain function can be sent to ranks, not {kind}; write def make_task(): …")
    name = function.__name__
    if name == "<lambda>":
        raise NotSelfContainedError(
            "a lambda cannot be sent to ranks, because it has no name; write def make_task(): …"
        )
    if function.__closure__:
        outer = ", ".join(function.__code__.co_freevars)
        raise NotSelfContainedError(f"{name} uses {outer} of the enclosing function; define it inside {name}")
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        raise NotSelfContainedError(
            f"the source of {name} cannot be found; define it in a notebook cell or in a file, not through exec"
        ) from None
    check(source, name, function.__globals__)
    return source


def check(source: str, factory: str, where: Mapping[str, Any] | None = None) -> None:
    """Raise NotSelfContainedError unless `source` is Python, defines `factory`, and uses no names from elsewhere.

    `where`, the notebook's names, only makes the message more helpful.
    """
    try:
        tree = ast.parse(source)
        table = symtable.symtable(ast.unparse(_without_annotations(tree)), "<source>", "exec")
    except (SyntaxError, ValueError, RecursionError) as error:
        line = f" (line {error.lineno})" if isinstance(error, SyntaxError) else ""
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise NotSelfContainedError(f"the source is not Python: {reason}{line}") from None
    own = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    # A name that a function declares `global` and assigns is also defined by the source.
    for scope in _scopes(table):
        own |= {s.get_name() for s in scope.get_symbols() if s.is_declared_global() and s.is_assigned()}
    if factory not in own:
        raise NotSelfContainedError(f"the source does not define {factory}")
    foreign = sorted(
        {
            symbol.get_name()
            for scope in _scopes(table)
            for symbol in scope.get_symbols()
            if symbol.is_referenced() and (symbol.is_global() or scope is table)
        }
        - own
        - _GIVEN
    )
    if foreign:
        raise NotSelfContainedError("; ".join(_explain(name, factory, where) for name in foreign))


def _scopes(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    """Yield the symbol table and all tables below it."""
    yield table
    for child in table.get_children():
        yield from _scopes(child)


def _explain(name: str, factory: str, where: Mapping[str, Any] | None) -> str:
    """Return what to do about a name that is not defined in the source."""
    if where is None or name not in where:
        return f"{name} is not defined in the source; define it inside {factory} or import it there"
    value = where[name]
    if isinstance(value, types.ModuleType):
        line = f"import {value.__name__}" + ("" if value.__name__ == name else f" as {name}")
        return f"{name} is imported elsewhere in the notebook; write `{line}` inside {factory}"
    return f"{name} is defined elsewhere in the notebook; define it inside {factory} or import it there"


def _without_annotations(tree: ast.Module) -> ast.Module:
    """Return a copy without annotations, because they are not evaluated on the ranks."""
    tree = ast.parse(ast.unparse(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return tree


def load_source(source: str, factory: str) -> Callable[..., Any]:
    """Run `source` as a module, on a rank, and return its `factory`. Tracebacks show the lines of the cell."""
    import __future__

    check(source, factory)
    filename = f"<notebook cell {factory}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    module = types.ModuleType("labkit_notebook_cell")
    module.__file__ = filename
    sys.modules[module.__name__] = module  # dataclasses and forward references look up their module
    code = compile(source, filename, "exec", flags=__future__.annotations.compiler_flag, dont_inherit=True)
    exec(code, module.__dict__)  # noqa: S102  the user's own code, on the user's own ranks
    loaded: Callable[..., Any] = getattr(module, factory)
    return loaded
