"""Distribution of a global sparsity over layers: how many of its weights each layer keeps.

- uniform: each layer keeps the same fraction;
- erk (Erdős–Rényi-kernel): small layers keep more, in proportion to the sum of a layer's dimensions over their product
  (Mocanu et al. 2018; Evci et al. 2020, arXiv:1911.11134).

ERK loses less accuracy at the same number of weights, but costs about twice the multiplications of uniform, because the
small layers of a convolutional network process the largest images.
"""

from __future__ import annotations

from math import prod
from typing import Literal

Distribution = Literal["uniform", "erk"]


def kept_counts(shapes: dict[str, tuple[int, ...]], sparsity: float, distribution: Distribution) -> dict[str, int]:
    """Return how many weights each layer keeps, by name; in total (1 - `sparsity`) of all, up to rounding."""
    if distribution == "uniform":
        return {name: round((1 - sparsity) * prod(shape)) for name, shape in shapes.items()}
    total = (1 - sparsity) * sum(map(prod, shapes.values()))
    full: set[str] = set()  # layers whose fraction would exceed one
    while True:
        rest = {name: sum(shape) / prod(shape) for name, shape in shapes.items() if name not in full}
        left = total - sum(prod(shapes[name]) for name in full)
        scale = left / sum(raw * prod(shapes[name]) for name, raw in rest.items()) if rest else 0.0
        over = {name for name, raw in rest.items() if scale * raw > 1}
        if not over:
            break
        full |= over
    return {
        name: prod(shape) if name in full else round(scale * rest[name] * prod(shape)) for name, shape in shapes.items()
    }
