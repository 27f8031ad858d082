"""Gradual magnitude pruning: the smallest weights are pruned, a few at a time (Zhu & Gupta 2017, arXiv:1710.01878)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from labkit.sparsity.cubic import Cubic

if TYPE_CHECKING:
    from torch import Tensor


class Gradual(Cubic):
    """Prunes the smallest weights in many small cuts."""

    class Options(Cubic.Options):
        scope: Literal["global", "layer"] = "global"
        """Whether weights are compared over the whole network or within each layer."""

    def choose_masks(self, step: int, weights: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keep the largest weights, fewer each time."""
        from labkit.sparsity.magnitude import keep_largest

        return keep_largest(weights, self.sparsity(step + 1), self.options.scope, self.masks)
