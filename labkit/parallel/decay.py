"""Which parameters weight decay pulls towards zero: weights do, biases and gains (fewer than two dimensions) do not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


def decays(parameter: Tensor) -> bool:
    """Is it a weight? The values of a sparse matrix are, and say so themselves."""
    return parameter.dim() >= 2 or getattr(parameter, "labkit_decays", False)


def by_shape(parameters: Iterable[nn.Parameter]) -> list[tuple[nn.Parameter, bool]]:
    """Each parameter, and whether it decays."""
    return [(parameter, decays(parameter)) for parameter in parameters]
