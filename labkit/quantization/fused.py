"""Elementwise functions on GPUs as one kernel, compiled by `torch.compile`.

Rounding to a grid or updating a moment takes a dozen operations per element. One by one, each of them reads and writes
the whole tensor in the GPU's memory; fused, it is read and written once. On CPUs, and for small tensors, where
compiling takes longer than it saves, the function runs as written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

LEAST = 1 << 20
"""Smaller tensors are computed operation by operation."""

P = ParamSpec("P")
R = TypeVar("R")


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """Return the function, compiled for large tensors on GPUs; its first argument is the tensor that decides.

    The function must be free of generators and counters: random numbers come as arguments.
    """

    @cache
    def compiled() -> Any:
        return torch.compile(function, dynamic=True)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first: Any = args[0]
        large = isinstance(first, Tensor) and first.is_cuda and first.numel() >= LEAST
        result: R = (compiled() if large else function)(*args, **kwargs)
        return result

    return call
