"""A section whose fields depend on a choice: `{"method": "topk", "ratio": 0.01}`."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, JsonValue, TypeAdapter, ValidationError, model_validator

from labkit.experiment.problem import OptionError, closest, explain
from labkit.experiment.registry import Registry, registry

_JSON: TypeAdapter[JsonValue] = TypeAdapter(JsonValue)


class Choice(BaseModel):
    """A registry key in the field `SELECTOR`, and beside it the options of the chosen method.

    The options are checked by the method's own model, defaults filled in, and read as attributes. Those of a class that
    this process must not run (own_methods.py) are kept as they are; the ranks check them.
    """

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False, use_attribute_docstrings=True)

    KNOB: ClassVar[str]
    SELECTOR: ClassVar[str] = "method"

    @classmethod
    def methods(cls) -> Registry:
        return registry(cls.KNOB)

    @property
    def key(self) -> str:
        """The chosen registry key."""
        chosen: str = getattr(self, self.SELECTOR)
        return chosen

    @property
    def options(self) -> dict[str, Any]:
        """The options of the chosen method (without the key and without the section's fixed fields)."""
        return dict(self.model_extra or {})

    def load(self) -> tuple[Any, Any]:
        """Return the class of the chosen method and its options, as an instance of the class's `Options`.

        For an own method whose code must not run in this process: the base class, and its default options.
        """
        method = self.methods()[self.key]
        model = method.options()
        return method.load(), model(**self.options) if method.is_loaded else model()

    @model_validator(mode="before")
    @classmethod
    def _check_options(cls, data: Any) -> Any:
        if isinstance(data, Choice):
            return data.model_dump()
        if not isinstance(data, dict):
            return data
        fixed = {name: data[name] for name in cls.model_fields if name in data}
        extra = {name: value for name, value in data.items() if name not in fixed}
        key = fixed.get(cls.SELECTOR, cls.model_fields[cls.SELECTOR].default)
        methods = cls.methods()
        if not isinstance(key, str) or key not in methods:
            names = methods.names()
            raise OptionError(
                cls.SELECTOR, f"unknown {methods.what} {key!r}; known: {', '.join(names)}", closest(str(key), names)
            )
        method = methods[key]
        if not method.is_loaded:
            return fixed | _plain(extra)
        model = method.options()
        try:
            chosen = model(**extra)
        except ValidationError as error:
            first = explain(error, model)[0]
            raise OptionError(first.field, first.reason, first.nearest) from None
        except TypeError as error:  # an option name that is no Python string
            raise OptionError("", str(error)) from None
        return fixed | chosen.model_dump()


def _plain(options: dict[Any, Any]) -> dict[str, Any]:
    """Return options that nobody has checked yet, if they are JSON values; raises OptionError if not."""
    for name, value in options.items():
        try:
            json.dumps(_JSON.validate_python(value, strict=True), allow_nan=False)
            if not isinstance(name, str):
                raise ValueError
        except ValueError:
            raise OptionError(str(name), f"{str(value)[:60]!r} is not a JSON value") from None
    return options
