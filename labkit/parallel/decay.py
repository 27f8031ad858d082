"""Which parameters weight decay applies to: weights, but not biases and norm weights (fewer than two dimensions)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


def decays(parameter: Tensor) -> bool:
    """Return whether weight decay applies to the parameter.

    It applies to tensors of at least two dimensions, and to parameters marked with `labkit_decays`: the values of a
    sparse matrix.
    """
    return parameter.dim() >= 2 or getattr(parameter, "labkit_decays", False)


def with_decay_flags(parameters: Iterable[nn.Parameter]) -> list[tuple[nn.Parameter, bool]]:
    """Pair each parameter with whether weight decay applies to it."""
    return [(parameter, decays(parameter)) for parameter in parameters]
