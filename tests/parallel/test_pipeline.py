"""What a stage of a pipeline sees."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from labkit.parallel.pipeline import _StageModule


class Noting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach())
        return 2 * x


def test_before_the_first_batch_a_stage_sees_the_same_on_every_rank() -> None:
    """Torch finds out shapes with memory that nobody has written, forward and backward."""
    inner = Noting()
    held = _StageModule(inner)
    unwritten = torch.full((2, 3), float("nan"), requires_grad=True)
    out = held(unwritten)
    assert out.requires_grad
    assert out.shape == (2, 3)
    assert torch.equal(inner.seen[0], torch.zeros(2, 3))
    held.has_batch = True
    held(torch.ones(2, 3))
    assert torch.equal(inner.seen[1], torch.ones(2, 3))
