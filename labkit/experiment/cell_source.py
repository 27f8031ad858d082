"""Send a function or class from a notebook cell to the ranks as source text.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def source_of_class(cls: type) -> str:
    """Return the source of a class from a notebook cell, with what it needs from the rest of the notebook.

    What it needs and can be imported on the ranks is imported there: modules, and classes and functions of modules.
    Raises NotSelfContainedError for anything else.
    """
    name = cls.__name__
    members = (getattr(member, "__func__", member) for member in vars(cls).values())
    functions = [member for member in members if inspect.isfunction(member)]
    source = _class_in_cell(name, functions)
    notebook = functions[0].__globals__
    if name != cls.__qualname__:
        raise NotSelfContainedError(f"{name} is defined inside a function or class; define it in a cell by itself")
    needed = foreign_names(source, name, annotations=True)  # pydantic evaluates those of options
    imports = [line for each in needed if (line := _import_line(each, notebook))]
    source = "\n".join([*imports, "", "", source]) if imports else source
    check(source, name, notebook)
    return source


def _class_in_cell(name: str, functions: Sequence[types.FunctionType]) -> str:
    """Return the text of the class statement that defines these functions.

    `inspect.getsource` finds no classes of a notebook's `__main__`, but functions know their cell.
    """
    for function in functions:
        lines = linecache.getlines(function.__code__.co_filename)
        try:
            tree = ast.parse("".join(lines))
        except SyntaxError:
            continue  # a cell with magics
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                return "".join(lines[first - 1 : node.end_lineno]).rstrip() + "\n"
    raise NotSelfContainedError(
        f"the source of {name} cannot be found; define it in a cell of its own, without magics, or in a file"
    )


def _import_line(name: str, notebook: Mapping[str, Any]) -> str:
    """Return the statement that imports what a name stands for in the notebook; empty if there is none."""
    value = notebook.get(name)
    if isinstance(value, types.ModuleType):
        return f"import {value.__name__}" + ("" if value.__name__ == name else f" as {name}")
    module, own_name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    if module in (None, "__main__") or getattr(sys.modules.get(str(module)), own_name, None) is not value:
        return ""
    return f"from {module} import {own_name}" + ("" if own_name == name else f" as {name}")


def check(source: str, factory: str, where: Mapping[str, Any] | None = None) -> None:
    """Raise NotSelfContainedError unless `source` is Python, defines `factory`, and uses no names from elsewhere.

    `where`, the notebook's names, only makes the message more helpful.
    """
    foreign = foreign_names(source, factory)
    if foreign:
        raise NotSelfContainedError("; ".join(_explain(name, factory, where) for name in foreign))


def foreign_names(source: str, factory: str, annotations: bool = False) -> list[str]:
    """Return the names that `source` uses and does not define; those in `annotations` count only if they shall.

    Raises NotSelfContainedError unless it is Python and defines `factory`.
    """
    try:
        tree = ast.parse(source)
        text = source if annotations else ast.unparse(_without_annotations(tree))
        table = symtable.symtable(text, "<source>", "exec")
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
    used = {
        symbol.get_name()
        for scope in _scopes(table)
        for symbol in scope.get_symbols()
        if symbol.is_referenced() and (symbol.is_global() or scope is table)
    }
    return sorted(used - own - _GIVEN)


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
    module = types.ModuleType(f"labkit_notebook_cell_{factory}")
    module.__file__ = filename
    sys.modules[module.__name__] = module  # dataclasses and forward references look up their module
    code = compile(source, filename, "exec", flags=__future__.annotations.compiler_flag, dont_inherit=True)
    exec(code, module.__dict__)  # noqa: S102  the user's own code, on the user's own ranks
    loaded: Callable[..., Any] = getattr(module, factory)
    return loaded
