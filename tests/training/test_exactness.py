"""A model that cannot be exact over ranks is named; random parts are found by trying."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from labkit.training.rehearsal.exactness import non_parity_modules
from labkit.training.rehearsal.loss_proof import prove_loss
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
    reasons = non_parity_modules(model, ranks=2)
    assert len(reasons) == (reason is not None)
    assert all(sentence.startswith(f"1: {reason}") for sentence in reasons)
    assert non_parity_modules(model, ranks=1) == []


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


class Encoding(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 1, 8, dropout=dropout, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.unsqueeze(1))[:, 0]


def a_task(layer: nn.Module, loss_fn: Any = None, **more: Any) -> Any:
    x = torch.randn(40, 4)
    data = (x, torch.arange(40) % 3)
    model = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 3))
    return as_task(
        {"model": model, "train": data, "test": data, "loss_fn": loss_fn or nn.CrossEntropyLoss()} | more, "f"
    )


RANDOM = [
    Functional(), Noise(), NumpyNoise(), Depth(), Recurrent(2), Attending(0.3), nn.RReLU(), nn.AlphaDropout(0.2),
    Encoding(0.1),
]  # fmt: skip


@pytest.mark.parametrize("layer", RANDOM, ids=lambda layer: type(layer).__name__)
def test_a_random_part_is_found_by_trying(layer: nn.Module) -> None:
    task = a_task(layer)
    (reason,) = non_parity_modules(task.model, 2, 1, task)
    assert reason.startswith("1")
    assert "draws different random numbers on every rank, so ranks differ from one process" in reason
    (reason,) = non_parity_modules(task.model, 1, 4, task)
    assert "on every pass, so passes differ" in reason
    assert non_parity_modules(task.model, 1, 1, task) == []


@pytest.mark.parametrize("layer", [Recurrent(1), Attending(0.0), nn.Dropout(0.0), nn.Identity()], ids=str)
def test_what_is_not_random_is_not_said_to_be(layer: nn.Module) -> None:
    task = a_task(layer)
    assert non_parity_modules(task.model, 2, 4, task) == []


def test_batch_normalisation_with_several_passes_on_one_rank_is_named() -> None:
    for layer in (nn.BatchNorm1d(4), nn.SyncBatchNorm(4)):
        (reason,) = non_parity_modules(nn.Sequential(layer), ranks=1, passes=2)
        assert reason == "0: batch normalisation sees only one pass's samples, so passes differ from a whole batch"


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
    assert len(non_parity_modules(task.model, 2, 1, task)) == 2
    prove_loss(task)
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
    (reason,) = non_parity_modules(task.model, 1, 1, task)
    assert reason.startswith("the training samples differ each time they are read")
    task = a_task(nn.Identity(), test=Augmented())
    (reason,) = non_parity_modules(task.model, 2, 1, task)
    assert reason.startswith("the held-out samples differ each time they are read")


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
    assert (prove_loss(a_task(nn.Identity(), loss_fn)).violation is None) == even


def test_a_weight_of_ones_own_makes_a_masked_loss_exact() -> None:
    task = a_task(nn.Identity(), masked, batch_weight=lambda y: (y > 0).sum())
    assert prove_loss(task).violation is None


def refuses(parts: str) -> Any:
    """A loss that is not a mean over samples and refuses some parts of a batch."""

    def loss(output: Tensor, target: Tensor) -> Tensor:
        count = len(output)
        if (parts == "one" and count < 2) or (parts == "pairs" and count < 3) or (parts == "odd" and count % 4):
            raise AssertionError(f"{count} samples are too few")
        return nn.functional.cross_entropy(output, target) * count

    return loss


@pytest.mark.parametrize("parts", ["one", "pairs", "odd"])
def test_a_loss_that_refuses_single_samples_is_tried_on_other_parts(parts: str) -> None:
    task = a_task(nn.Identity())
    task.loss_fn = refuses(parts)
    proof = prove_loss(task)
    assert proof.violation is not None
    assert "the loss is not a mean over samples: 40 samples give" in proof.violation


def test_a_loss_that_takes_whole_batches_only_is_said_to_be_unproved() -> None:
    task = a_task(nn.Identity())
    task.loss_fn = lambda output, target: nn.functional.cross_entropy(output.reshape(40, 3), target)
    proof = prove_loss(task)
    assert proof.violation is None
    (note,) = proof.notes
    assert note.startswith(
        "could not verify that the loss is a mean over samples: it fails on every part of 40 samples ("
    )
    assert "RuntimeError: shape '[40, 3]' is invalid" in note


def test_a_loss_without_a_finite_value_is_said_to_be_unproved() -> None:
    (note,) = prove_loss(a_task(nn.Identity(), lambda output, target: output.sum() * float("inf"))).notes
    assert note == "could not verify that the loss is a mean over samples: the loss of 40 samples is not finite"


class Centred(nn.Module):
    """A loss with a running mean of its own in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(3))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(output - self.center, target)
        self.center = 0.5 * self.center + 0.5 * output.detach().mean(0)
        return loss


@pytest.mark.parametrize("seed", [0, 18, 36, 80])  # under all but the first, one pass hardly moves the next loss
def test_a_loss_with_a_buffer_of_its_own_is_not_called_random(seed: int) -> None:
    torch.manual_seed(seed)
    task = a_task(nn.Identity(), Centred())
    before = task.loss_fn.center.clone()
    proof = prove_loss(task)
    assert proof.violation is None
    assert proof.notes == [
        "the loss keeps state from one pass to the next, and every rank keeps state of its own samples, "
        "so ranks differ from one process"
    ]
    assert torch.equal(task.loss_fn.center, before)


class Counting(nn.Module):
    """What it gives depends on the number of the pass, in an attribute and in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.count += 1
        return x * (1 + self.passes + self.count)


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


@pytest.mark.parametrize("layer", [Counting(), InPlace()], ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("first", [True, False])
def test_counters_and_work_in_place_are_not_called_random(layer: nn.Module, first: bool) -> None:
    task = a_task(layer)
    if first:
        task.model = nn.Sequential(layer, *list(task.model)[::2])
    assert non_parity_modules(task.model, 2, 1, task) == []


@pytest.mark.parametrize("kept_in", ["attribute", "buffer"])
def test_dropout_that_begins_late_is_noticed(kept_in: str) -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            if kept_in == "buffer":
                self.register_buffer("passes", torch.zeros((), dtype=torch.long))
            else:
                self.passes = 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += self.training
            return nn.functional.dropout(x, 0.5) if self.passes > 1000 else x

    layer = Late()
    task = a_task(layer)
    (reason,) = non_parity_modules(task.model, 2, 1, task)
    assert reason.startswith("1: a random part draws different random numbers on every rank")
    assert layer.passes == 0


def test_a_generator_of_ones_own_is_random() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.draws = np.random.default_rng(0)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.draws.random()

    task = a_task(Own())
    (reason,) = non_parity_modules(task.model, 2, 1, task)
    assert reason.startswith("1: a random part draws different random numbers")
