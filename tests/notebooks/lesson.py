"""A lesson as the tests see it: its cells by role, its parameters, its exercises with their solutions."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import nbformat
import papermill

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"
LESSONS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))


@dataclass(frozen=True)
class Lesson:
    """A stored notebook. Roles are cell tags: parameters, claims, exercise, check, solution."""

    path: Path

    @cached_property
    def notebook(self) -> Any:
        return nbformat.read(self.path, as_version=4)  # type: ignore[no-untyped-call]

    @property
    def name(self) -> str:
        return self.path.stem

    def cells(self, role: str) -> list[Any]:
        """The cells with this tag, in order."""
        return [cell for cell in self.notebook.cells if role in cell.metadata.get("tags", [])]

    @property
    def code(self) -> list[Any]:
        return [cell for cell in self.notebook.cells if cell.cell_type == "code"]

    @property
    def parameters(self) -> set[str]:
        """The names that papermill can set."""
        return set(papermill.inspect_notebook(str(self.path)))

    @property
    def claims(self) -> str:
        """Source of the cell with what one should have seen."""
        (cell,) = self.cells("claims")
        return str(cell.source)

    @property
    def messages(self) -> set[str]:
        """The message of every assertion among the claims."""
        asserts = [node for node in ast.walk(ast.parse(self.claims)) if isinstance(node, ast.Assert)]
        return {node.msg.value for node in asserts if isinstance(node.msg, ast.Constant)}

    @property
    def exercises(self) -> list[tuple[Any, Any, str]]:
        """(exercise cell, check cell, code of the solution) of every exercise."""
        solutions = [fenced(cell.source) for cell in self.cells("solution")]
        return list(zip(self.cells("exercise"), self.cells("check"), solutions, strict=True))


def fenced(markdown: str) -> str:
    """The Python code in a solution."""
    return "\n".join(re.findall(r"```python\n(.*?)```", markdown, re.S))
