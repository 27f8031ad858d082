"""RigL: drop the smallest weights, grow those whose gradient is largest (Evci et al., ICML 2020, arXiv:1911.11134).

The gradient is that of the whole batch, after the reduction over ranks, so that all ranks grow the same. Weights that
are zero have a gradient because the backward pass is dense here; it is looked at only in the updates that change the
topology. There the optimizer steps too; RigL's own code leaves its step out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from labkit.sparsity.dynamic import Dynamic

if TYPE_CHECKING:
    from torch import Tensor


class RigL(Dynamic):
    """Regrow by gradient."""

    uses_gradients = True

    def growth(self, name: str, number: int, step: int, gradients: dict[str, Tensor], weight: Tensor) -> Tensor:
        """The size of the gradient."""
        return gradients[name]
