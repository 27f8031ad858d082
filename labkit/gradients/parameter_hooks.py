"""The hooks that somebody has put on a parameter, of both kinds that torch has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def gradient_hooks(parameter: Tensor) -> list[Callable[[Tensor], Any]]:
    """Return the hooks of `register_hook`, in order: each is given a gradient and may return another."""
    return list((parameter._backward_hooks or {}).values())


def accumulated_hooks(parameter: Tensor) -> list[Callable[[Tensor], Any]]:
    """Return the hooks of `register_post_accumulate_grad_hook`, in order: each is given the parameter."""
    return list((getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values())
