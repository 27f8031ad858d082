"""Detect whether the control flow of a model depends on its input, on random numbers, or on the number of calls."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class ControlFlowProbe(TorchDispatchMode):
    """Dispatch mode that detects whether the model's control flow may depend on values, chance or the call count.

    It watches for anything that a branch in Python could depend on: a number read from a tensor, a draw from the random
    generator of numpy or Python, an attribute changed by the pass (`changed` returns True).
    """

    def __init__(self, changed: Callable[[], bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.changed, self.detected = changed, False
        self.differs_when_repeated = False
        """Whether a second pass over the same samples may branch differently or compute other numbers."""

    def __enter__(self) -> Any:
        self._state_before = _generator_state()
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *about: Any) -> None:
        super().__exit__(*about)  # type: ignore[no-untyped-call]
        self.differs_when_repeated |= self._state_before != _generator_state() or self.changed()
        self.detected |= self.differs_when_repeated

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.detected = True
        return func(*args, **(kwargs or {}))


def _generator_state() -> tuple[Any, ...]:
    """Return the state of the random generators of Python and numpy, which every draw changes."""
    state: Any = np.random.get_state()
    return random.getstate(), state[2], state[1][0]
