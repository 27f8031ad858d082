"""Random numbers that depend on the seed alone, in the global generators of torch, numpy and Python's `random`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_NUMPY_SEEDS = 2**32


def seed_generators(seed: int) -> None:
    """Seed torch's CPU generator, numpy's global generator and Python's `random` with `seed` (8 µs).

    `torch.manual_seed` would also queue a call for every other kind of device.
    """
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % _NUMPY_SEEDS)
    random.seed(seed)


@contextmanager
def unchanged_generators() -> Iterator[None]:
    """Restore the state of the three generators at the end."""
    torch_state = torch.default_generator.get_state()
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.default_generator.set_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch, numpy and `random` with `seed` inside, and restore their state at the end."""
    with unchanged_generators():
        seed_generators(seed)
        yield
