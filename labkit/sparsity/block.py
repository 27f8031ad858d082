"""Block sparsity: square blocks of a weight matrix are pruned, the smallest first, on the cubic schedule.

Kernels for blocks need one index for many weights; this costs accuracy, because a block keeps weights that would have
been pruned on their own (Gray et al., "GPU Kernels for Block-Sparse Weights", 2017). A convolution is treated as the
matrix [outputs, inputs x kernel].
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import Field

from labkit.sparsity.gradual import Gradual
from labkit.sparsity.magnitude import number_kept
from labkit.sparsity.method import REACHED_WITHIN

if TYPE_CHECKING:
    from torch import Tensor


class Block(Gradual):
    """Prunes square blocks of weights gradually."""

    class Options(Gradual.Options):
        size: int = Field(default=16, ge=1, le=1024)
        """Rows and columns of a block."""

    def notes(self) -> list[str]:
        """Return a sentence if the layers have too few blocks to come close to the target; [] otherwise."""
        counts = [number_of_blocks(shape, self.options.size) for shape in self.context.shapes.values()]
        groups = counts if self.options.scope == "layer" else [sum(counts)]
        reached = sum(count - number_kept(count, self.target) for count in groups) / sum(counts)
        if abs(reached - self.target) <= REACHED_WITHIN:
            return []
        size = self.options.size
        return [
            f"sparsity.target {self.target:g} is out of reach for blocks of {size} × {size} weights: the layers have "
            f"{sum(counts)} of them, so about {reached:.2f} become zero; set sparsity.size to a smaller block"
        ]

    def choose_masks(self, step: int, weights: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Choose the blocks whose weights have the largest mean magnitude."""
        from labkit.sparsity.magnitude import keep_largest

        size = self.options.size
        scores = {name: block_means(weight, size) for name, weight in weights.items()}
        chosen = keep_largest(scores, self.sparsity(step + 1), self.options.scope, self.masks)
        return {name: expand_blocks(chosen[name], weight, size) for name, weight in weights.items()}


def number_of_blocks(shape: tuple[int, ...], size: int) -> int:
    """Return how many blocks of `size` × `size` cover a weight of this shape; those at the edge may be smaller."""
    rows = shape[0] if len(shape) == 4 else math.prod(shape[:-1])
    columns = math.prod(shape) // rows
    return math.ceil(rows / size) * math.ceil(columns / size)


def as_matrix(weight: Tensor) -> Tensor:
    """Reshape a weight to [rows, columns]: experts are stacked along the rows, a filter of a convolution is a row."""
    return weight.flatten(1) if weight.dim() == 4 else weight.flatten(0, -2)


def block_means(weight: Tensor, size: int) -> Tensor:
    """Return the mean magnitude of each block, [block rows, block columns]; those at the edge may be smaller."""
    import torch

    matrix = as_matrix(weight).abs()
    below, right = -matrix.shape[0] % size, -matrix.shape[1] % size
    padded = torch.nn.functional.pad(matrix, (0, right, 0, below))
    inside = torch.nn.functional.pad(torch.ones_like(matrix), (0, right, 0, below))
    grid = (padded.shape[0] // size, size, padded.shape[1] // size, size)
    return padded.view(grid).sum((1, 3)) / inside.view(grid).sum((1, 3))


def expand_blocks(blocks: Tensor, weight: Tensor, size: int) -> Tensor:
    """Expand a mask of blocks to a mask of weights."""
    rows, columns = as_matrix(weight).shape
    mask = blocks.repeat_interleave(size, 0).repeat_interleave(size, 1)[:rows, :columns]
    return mask.reshape(weight.shape)
