"""SET: drop the smallest weights, grow as many at random (Mocanu et al., Nature Communications 2018)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from labkit.sparsity.dynamic import Dynamic

if TYPE_CHECKING:
    from torch import Tensor


class SparseEvolutionaryTraining(Dynamic):
    """Grows random weights."""

    def growth(self, name: str, layer_index: int, step: int, gradients: dict[str, Tensor], weight: Tensor) -> Tensor:
        """Return random numbers, which are the same on every rank."""
        import torch

        seed = (self.seed * 100_003 + layer_index) * 1_000_003 + step + 1
        generator = torch.Generator().manual_seed(seed % 2**63)
        return torch.rand(weight.shape, generator=generator).to(weight.device)
