"""A section whose fields depend on a choice: `{"method": "topk", "ratio": 0.01}`."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from labkit.experiment.problem import OptionError, closest, explain
from labkit.experiment.registry import Registry, registry


class Choice(BaseModel):
    """A registry key in the field `SELECTOR`, and beside it the options of the chosen method.

    The options are checked by the method's own model, defaults filled in, and read as attributes. A method that is
    planned but not there yet is kept as a bare name, so that `problems()` can refuse it by name.
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
        if not methods[key].available:
            return fixed
        model = methods.options(key)
        try:
            chosen = model(**extra)
        except ValidationError as error:
            first = explain(error, model)[0]
            raise OptionError(first.field, first.reason, first.nearest) from None
        except TypeError as error:  # an option name that is no Python string
            raise OptionError("", str(error)) from None
        return fixed | chosen.model_dump()
