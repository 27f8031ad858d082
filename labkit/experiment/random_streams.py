"""Seeds of random streams that are independent of each other, although all of them follow from `training.seed`.

Dropout and augmentation are seeded by seed, step and share. Were rounding seeded by the same integer, its generator
would draw the same numbers as they do, and a weight would be rounded up where a unit is dropped.
"""

from __future__ import annotations

from enum import IntEnum


class Stream(IntEnum):
    """Purposes for which random numbers are drawn."""

    LAYER_ROUNDING = 1
    """Stochastic rounding in the products of low-precision layers."""
    WEIGHT_ROUNDING = 2
    """Stochastic rounding of weights after an optimizer step."""
    STATE_ROUNDING = 3
    """Stochastic rounding within an optimizer."""


def stream_seed(seed: int, stream: Stream, *place: int) -> int:
    """Return the seed (0 to 2**63 - 1) of a stream at a place, e.g. a step and the index of a rank."""
    import numpy as np

    state = np.random.SeedSequence([seed, int(stream), *place]).generate_state(1, np.uint64)
    return int(state[0]) >> 1
