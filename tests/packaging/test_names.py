"""Names that say nothing may not come back: a definition is called by what it holds or does."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Everyday participles fit any value and so say nothing about the one they hold: `problems`, not `found`.
FORBIDDEN = frozenset(
    {
        *("found", "one", "said", "told", "many", "wanted"),
        *("made", "known", "looked", "taken", "judged", "spread"),
    }
)
FILES = [path for folder in ("labkit", "tests/benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]


def definitions(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and name of everything that a source file gives a name to, without leading underscores."""
    for node in ast.walk(ast.parse(source)):
        name: str | None = None
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = node.name
        elif isinstance(node, ast.arg):
            name = node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            name = node.attr
        elif isinstance(node, ast.alias):
            name = node.asname
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar):
            name = node.name
        elif isinstance(node, ast.MatchMapping):
            name = node.rest
        if name is not None:
            yield node.lineno, name.strip("_")


def forbidden(source: str, path: str) -> list[str]:
    """Return `path:line: name` for each definition with a forbidden name, in the order of the lines."""
    return [f"{path}:{line}: {name}" for line, name in sorted(definitions(source)) if name in FORBIDDEN]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_definition_has_a_name_that_says_what_it_is(path: Path) -> None:
    problems = forbidden(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "source",
    [
        "found = 1",
        "_found = 1",
        "found: int = 1",
        "found += 1",
        "first, (found, *rest) = 1, (2, 3)",
        "first, *found = 1, 2",
        "if (found := 1): pass",
        "self.found = 1",
        "self._found: int = 1",
        "def found(): pass",
        "async def found(): pass",
        "class found: pass",
        "class Result:\n    found: int",
        "def function(found): pass",
        "def function(found, /): pass",
        "def function(*, found=1): pass",
        "def function(*found): pass",
        "def function(**found): pass",
        "lambda found: 1",
        "for found in (): pass",
        "for index, found in (): pass",
        "with open('file') as found: pass",
        "[found for found in ()]",
        "{found: 1 for found in ()}",
        "try: pass\nexcept ValueError as found: pass",
        "import json as found",
        "from json import loads as found",
        "match 1:\n    case found: pass",
        "match 1:\n    case [*found]: pass",
        "match 1:\n    case {**found}: pass",
    ],
)
def test_each_kind_of_definition_is_noticed(source: str) -> None:
    line = next(number for number, text in enumerate(source.splitlines(), 1) if "found" in text)
    assert forbidden(source, "file.py") == [f"file.py:{line}: found"]


@pytest.mark.parametrize(
    "source", ["print(found)", "self.found.append(1)", "call(found=1)", "'found'", "problems_found = 1"]
)
def test_uses_of_a_name_from_elsewhere_are_allowed(source: str) -> None:
    assert forbidden(source, "file.py") == []
