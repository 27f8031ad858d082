"""RigL: drop the smallest weights, grow those whose gradient is largest (Evci et al., ICML 2020, arXiv:1911.11134).

The gradient is that of the global batch, after the reduction over ranks, so that all ranks grow the same weights. Zero
weights have a gradient because the backward pass is dense here; it is used only in the steps that change the topology.
The optimizer steps there too, whereas RigL's own code skips its step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from labkit.sparsity.dynamic import Dynamic

if TYPE_CHECKING:
    from torch import Tensor


class RigL(Dynamic):
    """Grows the weights with the largest gradients."""

    uses_gradients = True

    def growth(self, name: str, layer_index: int, step: int, gradients: dict[str, Tensor], weight: Tensor) -> Tensor:
        """Return the gradient, whose magnitude decides."""
        return gradients[name]
