"""Docstrings of the fields of a dataclass, from its source, so that a reference page is made from the code itself."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any


def field_docstrings(kind: type[Any]) -> dict[str, str]:
    """Return the docstring below each field of a dataclass, on one line; those of its bases come first.

    A field without a docstring is left out. Raises OSError if the source of the class cannot be read.
    """
    docstrings: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if "__dataclass_fields__" not in vars(base):
            continue
        [definition] = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for statement, below in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                text = below.value if isinstance(below, ast.Expr) else None
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    docstrings[statement.target.id] = " ".join(text.value.split())
    return docstrings
