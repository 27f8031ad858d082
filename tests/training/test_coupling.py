"""Layers that mix the samples of a batch are named, whatever mixes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from labkit.training.rehearsal.exactness import non_parity_modules
from tests.training.test_exactness import Attending, Counting, Encoding, Reassigned, Recurrent, a_task


class Centring(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class InTrainingOnly(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0) if self.training else x


class AmongSamples(nn.Module):
    """Attention over the batch: a layer that was not told batch_first."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(1)
        return self.attention(x, x, x)[0][:, 0]


class BySize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / len(x)


class Wrapped(nn.Module):
    """The layer works beside something random."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(nn.functional.dropout(x, 0.5, self.training))


COUPLED = [(Centring(), "1"), (InTrainingOnly(), "1"), (AmongSamples(), "1.attention"), (BySize(), "1")]


@pytest.mark.parametrize(("layer", "name"), COUPLED, ids=lambda part: type(part).__name__)
def test_samples_that_change_what_others_give_are_named(layer: nn.Module, name: str) -> None:
    task = a_task(layer)
    assert non_parity_modules(task.model, 2, 1, task) == [
        f"{name}: mixes the samples of a batch but sees only one rank's, so ranks differ from one process"
    ]
    assert non_parity_modules(task.model, 1, 2, task) == [
        f"{name}: mixes the samples of a batch but sees only one pass's, so passes differ from a whole batch"
    ]
    assert non_parity_modules(task.model, 1, 1, task) == []


def test_so_they_are_beside_something_random_and_batch_normalisation() -> None:
    task = a_task(Wrapped(nn.Sequential(nn.BatchNorm1d(4), Centring())))
    reasons = non_parity_modules(task.model, 2, 1, task)
    assert [reason.partition(":")[0] for reason in reasons] == ["1.layer.0", "1.layer.1", "1"]
    assert "mixes the samples of a batch" in reasons[1]
    assert len(non_parity_modules(nn.Sequential(nn.BatchNorm1d(4)), 2, 1, a_task(nn.BatchNorm1d(4)))) == 1


class Turning(nn.Module):
    """Only the phase of a complex number tells that the samples are mixed."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.polar(torch.ones_like(x), x.mean(0).expand_as(x))


def test_a_phase_that_changes_is_seen() -> None:
    task = a_task(nn.Identity())
    assert len(non_parity_modules(nn.Sequential(Turning()), 2, 1, task)) == 1


@pytest.mark.parametrize(
    "layer",
    [Recurrent(1), Attending(0.0), Encoding(0.0), nn.LayerNorm(4), nn.GroupNorm(2, 4), Counting(), Reassigned()],
    ids=lambda layer: type(layer).__name__,
)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_samples_that_keep_to_themselves_are_not_said_to_mix(layer: nn.Module, kind: torch.dtype) -> None:
    task = a_task(layer)
    task.model.to(kind)
    assert non_parity_modules(task.model, 2, 1, task, lambda batch: batch | {"x": batch["x"].to(kind)}) == []
