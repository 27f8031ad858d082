"""Problems of a request, each described in one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import ValidationError


@dataclass(frozen=True)
class Problem:
    """One reason why an experiment cannot run.

    `field` is the dotted name of the setting, `reason` a clause without a full stop, `nearest` the closest legal value
    (None if there is none to offer).
    """

    field: str
    reason: str
    nearest: Any = None

    def __str__(self) -> str:
        hint = "" if self.nearest is None else f"; nearest legal value: {self.nearest}"
        where = f"{self.field}: " if self.field else ""
        return f"{where}{self.reason}{hint}."


class ExperimentError(ValueError):
    """Raised for an invalid experiment. `problems` lists every reason; the message has one sentence per line."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class OptionError(ValueError):
    """Raised inside a pydantic validator to name the option at fault below the validated section."""

    def __init__(self, field: str, reason: str, nearest: Any = None) -> None:
        self.field, self.reason, self.nearest = field, reason, nearest
        super().__init__(f"{field}: {reason}" if field else reason)


def closest(word: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate that `word` was probably meant to be, or None."""
    matches = get_close_matches(word, list(candidates), n=1, cutoff=0.5)
    return matches[0] if matches else None


def unknown(field: str, word: str, candidates: Iterable[str], what: str = "field") -> Problem:
    """Return a problem that says that `word` is not one of the candidates."""
    candidates = list(candidates)
    if not candidates:
        return Problem(field, f"there is no {what} {word!r} here")
    return Problem(field, f"unknown {what} {word!r}; known: {', '.join(candidates)}", closest(word, candidates))


_NOT_OF_TYPE = ("_type", "_parsing", "_parsing_size", "_from_float", "_unicode")
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "model": "a JSON object with named fields",
    "dict": "a JSON object with named fields",
    "tuple": "a list such as [1, 5]",
}
_COMPARISONS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("greater than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}


def explain(error: ValidationError, model: type | None = None, prefix: str = "") -> list[Problem]:
    """Turn pydantic's error into problems, such as `training.steps: must be at least 1, got 0`."""
    problems = []
    for item in error.errors(include_url=False):
        path = [str(part) for part in item["loc"] if part != "[key]"]
        field = ".".join(([prefix] if prefix else []) + path)
        kind, given, context = item["type"], item.get("input"), item.get("ctx", {})
        if kind == "extra_forbidden":
            candidates = _fields_at(model, path[:-1])
            problems.append(unknown(field, path[-1], candidates))
        elif kind in _COMPARISONS:
            words, key = _COMPARISONS[kind]
            bound = context[key]
            nearest = bound if key in ("ge", "le") else None
            problems.append(Problem(field, f"must be {words} {bound:g}, got {_short(given)}", nearest))
        elif kind == "finite_number":
            problems.append(Problem(field, f"must be a finite number, got {_short(given)}"))
        elif kind == "literal_error":
            offered = re.findall(r"'([^']*)'", context["expected"])
            message = f"must be one of {context['expected']}, got {_short(given)}"
            problems.append(Problem(field, message, closest(str(given), offered)))
        elif kind == "string_too_long":
            most = context["max_length"]
            problems.append(Problem(field, f"must have at most {most} characters, got {len(str(given))}"))
        elif kind.endswith(_NOT_OF_TYPE) and kind.split("_")[0] in _KINDS:
            what = _KINDS[kind.split("_")[0]] + (" or a short form like dp2·tp2" if field == "layout" else "")
            who = "" if field else "the experiment "
            problems.append(Problem(field, f"{who}must be {what}, got {_short(given)}"))
        elif kind == "missing":
            problems.append(Problem(field, "is required"))
        elif isinstance(context.get("error"), OptionError):
            inner = context["error"]
            dotted = ".".join(part for part in (field, inner.field) if part)
            problems.append(Problem(dotted, inner.reason, inner.nearest))
        else:
            message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
            got = "" if "error" in context else f", got {_short(given)}"
            problems.append(Problem(field, (message[:1].lower() + message[1:]).rstrip(".") + got))
    return problems


def _fields_at(model: type | None, path: list[str]) -> list[str]:
    """Return the names of the fields of the section at `path` below `model`."""
    for part in path:
        annotation = getattr(model, "model_fields", {})[part].annotation if model else None
        kinds = (annotation, *get_args(annotation))  # a section that may be null is a union
        model = next((kind for kind in kinds if hasattr(kind, "model_fields")), None)
    return list(getattr(model, "model_fields", {}))


def _short(value: Any, limit: int = 60) -> str:
    """Return the repr of a value, cut to `limit` characters."""
    try:
        text = "null" if value is None else repr(value)
    except RecursionError:
        text = "something nested too deeply"
    return text if len(text) <= limit else text[: limit - 1] + "…"
