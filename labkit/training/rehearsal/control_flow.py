"""Does the way through a model depend on what it sees, on chance, or on how often it was called?"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class ControlFlowProbe(TorchDispatchMode):
    """While it is open: does the way through the model depend on numbers, on chance or on the number of the pass?

    Told by what a branch in Python needs: a number taken out of a tensor, a draw from numpy's or Python's generator, an
    attribute that the pass has changed.
    """

    def __init__(self, changed: Callable[[], bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.changed, self.seen = changed, False
        self.other_twice = False
        """Would the same pass with the same samples take another way, or compute other numbers, the second time?"""

    def __enter__(self) -> Any:
        self._drawn = _drawn()
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *about: Any) -> None:
        super().__exit__(*about)  # type: ignore[no-untyped-call]
        self.other_twice |= self._drawn != _drawn() or self.changed()
        self.seen |= self.other_twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.seen = True
        return func(*args, **(kwargs or {}))


def _drawn() -> tuple[Any, ...]:
    """How far the generators of Python and numpy have come."""
    state: Any = np.random.get_state()
    return random.getstate(), state[2], state[1][0]
