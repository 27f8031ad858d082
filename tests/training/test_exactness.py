"""A model that cannot be exact over ranks is named; random parts are found by trying."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from labkit.training.exactness import inexact_parts, uneven_loss
from labkit.workloads.custom_task import as_task


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.BatchNorm1d(4), "batch normalisation"),
        (nn.Dropout(0.1), "dropout"),
        (nn.Dropout(0.0), None),
        (nn.GroupNorm(2, 4), None),
        (nn.SyncBatchNorm(4), None),
    ],
)
def test_what_looks_beyond_a_sample_is_named(layer: nn.Module, reason: str | None) -> None:
    model = nn.Sequential(nn.Linear(4, 4), layer)
    reasons = inexact_parts(model, ranks=2)
    assert len(reasons) == (reason is not None)
    assert all(sentence.startswith(f"1: {reason}") for sentence in reasons)
    assert inexact_parts(model, ranks=1) == []


class Functional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.3, self.training)


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x) if self.training else x


class NumpyNoise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + np.random.rand()) + random.random()


class Depth(nn.Module):
    """Leaves its layer out now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.layerdrop = nn.Linear(4, 4), 0.2

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training and torch.rand(()) < self.layerdrop else self.layer(x)


class Recurrent(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, layers, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x.unsqueeze(1))[0][:, -1]


class Attending(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 1, dropout=dropout, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(1).expand(-1, 6, -1)
        return self.attention(x, x, x)[0][:, 0]


def a_task(layer: nn.Module, loss_fn: Any = None, **more: Any) -> Any:
    x = torch.randn(40, 4)
    data = (x, torch.arange(40) % 3)
    model = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 3))
    return as_task(
        {"model": model, "train": data, "test": data, "loss_fn": loss_fn or nn.CrossEntropyLoss()} | more, "f"
    )


RANDOM = [
    Functional(), Noise(), NumpyNoise(), Depth(), Recurrent(2), Attending(0.3), nn.RReLU(), nn.AlphaDropout(0.2),
    nn.TransformerEncoderLayer(4, 1, 8, dropout=0.1),
]  # fmt: skip


@pytest.mark.parametrize("layer", RANDOM, ids=lambda layer: type(layer).__name__)
def test_a_random_part_is_found_by_trying(layer: nn.Module) -> None:
    task = a_task(layer)
    (reason,) = inexact_parts(task.model, 2, 1, task)
    assert reason.startswith("1")
    assert "draws other numbers on every rank, so ranks differ from one process" in reason
    (reason,) = inexact_parts(task.model, 1, 4, task)
    assert "on every pass, so passes differ" in reason
    assert inexact_parts(task.model, 1, 1, task) == []


@pytest.mark.parametrize("layer", [Recurrent(1), Attending(0.0), nn.Dropout(0.0), nn.Identity()], ids=str)
def test_what_is_not_random_is_not_said_to_be(layer: nn.Module) -> None:
    task = a_task(layer)
    assert inexact_parts(task.model, 2, 4, task) == []


def test_batch_normalisation_with_several_passes_on_one_rank_is_named() -> None:
    for layer in (nn.BatchNorm1d(4), nn.SyncBatchNorm(4)):
        (reason,) = inexact_parts(nn.Sequential(layer), ranks=1, passes=2)
        assert reason == "0: batch normalisation sees one pass's samples, so passes differ from a batch in one piece"


class Reassigned(nn.Module):
    """A running mean that is another tensor after every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x


def test_the_proof_leaves_nothing_behind() -> None:
    task = a_task(nn.Sequential(nn.BatchNorm1d(4), Reassigned(), NumpyNoise(), nn.Dropout(0.5)))
    task.model[1][0].eval()
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    modes = [module.training for module in task.model.modules()]
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    assert len(inexact_parts(task.model, 2, 1, task)) == 2
    uneven_loss(task)
    assert all(torch.equal(before[name], tensor) for name, tensor in task.model.state_dict().items())
    assert [module.training for module in task.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()


class Augmented(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((4,), float(index)) + torch.randn(4), index % 3


def test_samples_that_are_others_each_time_are_noticed() -> None:
    task = a_task(nn.Identity(), train=Augmented())
    (reason,) = inexact_parts(task.model, 1, 1, task)
    assert reason.startswith("the training samples are others each time they are read")
    task = a_task(nn.Identity(), test=Augmented())
    (reason,) = inexact_parts(task.model, 2, 1, task)
    assert reason.startswith("the held-out samples are others")


def masked(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, target.where(target > 0, -100))


@pytest.mark.parametrize(
    ("loss_fn", "even"),
    [
        (nn.CrossEntropyLoss(), True),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2]), ignore_index=1), True),
        (lambda output, target: nn.functional.cross_entropy(output, target), True),
        (lambda output, target: nn.functional.cross_entropy(output, target, weight=torch.tensor([1.0, 5, 0.2])), False),
        (masked, False),
        (lambda output, target: nn.functional.cross_entropy(output, target).sqrt(), False),
        (lambda output, target: nn.functional.cross_entropy(output, target) * torch.rand(()), False),
        (lambda output, target: (output @ output.T).logsumexp(1).mean(), False),
    ],
)
def test_a_loss_must_be_the_mean_that_its_weights_say(loss_fn: Any, even: bool) -> None:
    assert (uneven_loss(a_task(nn.Identity(), loss_fn)) is None) == even


def test_a_weight_of_ones_own_makes_a_masked_loss_exact() -> None:
    task = a_task(nn.Identity(), masked, batch_weight=lambda y: (y > 0).sum())
    assert uneven_loss(task) is None
