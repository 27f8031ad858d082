"""SET: drop the smallest weights, grow as many anywhere (Mocanu et al., Nature Communications 2018)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from labkit.sparsity.dynamic import Dynamic

if TYPE_CHECKING:
    from torch import Tensor


class SparseEvolutionaryTraining(Dynamic):
    """Regrow at random."""

    def growth(self, name: str, number: int, step: int, gradients: dict[str, Tensor], weight: Tensor) -> Tensor:
        """Chance, the same on every rank."""
        import torch

        seed = (self.seed * 100_003 + number) * 1_000_003 + step + 1
        generator = torch.Generator().manual_seed(seed % 2**63)
        return torch.rand(weight.shape, generator=generator).to(weight.device)
