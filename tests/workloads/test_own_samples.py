"""A user's own data, outputs and losses: taken for what they are, or refused in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from labkit.workloads.accuracy import correct_and_counted
from labkit.workloads.custom_task import as_task
from tests.workloads.helpers import evaluate, train

X = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
Y = X[:, :4].argmax(1)


class Made(torch.utils.data.Dataset):
    def __init__(self, sample: Callable[[int], Any]) -> None:
        self.sample = sample

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        return self.sample(index)


def task(data: Any, loss_fn: Any = None, model: nn.Module | None = None, **more: Any) -> Any:
    model = model or nn.Sequential(nn.Flatten(), nn.Linear(8, 4))
    loss_fn = loss_fn or nn.CrossEntropyLoss()
    return as_task({"model": model, "train": data, "test": data, "loss_fn": loss_fn} | more, "f")


ALL = list(range(40))


@pytest.mark.parametrize(
    ("sample", "sentence"),
    [
        (lambda i: {"x": X[i], "y": Y[i]}, r"train from f must give pairs .*, but its first sample is dict"),
        (lambda i: (X[i] if i < 9 else X[i][:7], Y[i]), r"samples 0 and 9 of train from f cannot be stacked: their x"),
        (
            lambda i: (X[i], "abcd"[Y[i]]),
            r"sample 0 of (train|test) from f: its y must be .*, but it is str \('[a-d]'\)",
        ),
        (lambda i: (X[i], None if i == 20 else Y[i]), r"sample 20 of train from f: its y must be .*, but it is None"),
        (lambda i: (None, Y[i]), r"sample 0 of (train|test) from f: its x must be .*, but it is None"),
        (lambda i: ({"ids": X[i]}, Y[i]), r"sample 0 of (train|test) from f: its x must be .*, but it is dict"),
        (lambda i: (X[i], Y[i], 1) if i == 3 else (X[i], Y[i]), r"sample 3 of train from f must be a pair"),
    ],
)
def test_a_sample_that_does_not_fit_is_named_by_its_index(sample: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        task(Made(sample)).train.__getitems__(ALL)


def test_what_a_data_set_raises_is_told_with_its_sample() -> None:
    def broken(index: int) -> Any:
        if index == 21:
            raise OSError("image file is truncated")
        return X[index], int(Y[index])

    with pytest.raises(ValueError, match="sample 21 of train from f cannot be read: image file is truncated"):
        task(Made(broken)).train.__getitems__(ALL)


def test_a_data_set_of_the_hubs_library_is_refused_by_name() -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra 'hub'")
    data = datasets.Dataset.from_dict({"x": X.tolist(), "y": Y.tolist()}).with_format("torch")
    with pytest.raises(ValueError, match="train from f is a Dataset of the library datasets, whose samples are dicts"):
        task(data)
    with pytest.raises(ValueError, match=r"train from f must be .*, but it is DataLoader"):
        task(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y)))


@pytest.mark.parametrize(
    "data",
    [
        (X, Y.int()),
        (X, Y.to(torch.uint8)),
        (X.numpy(), Y.numpy().astype(np.int32)),
        Made(lambda i: (X[i].numpy(), np.int32(Y[i]))),
        Made(lambda i: ((X[i] * 50 + 128).clamp(0, 255).to(torch.uint8), int(Y[i]))),
        ((X * 10).long(), Y),
    ],
)
def test_whole_numbers_of_every_width_train(data: Any) -> None:
    made = task(data)
    losses = train(made, 60, 40, 2e-2)
    assert losses[-1] < losses[0]
    assert 0 <= evaluate(made)["accuracy"] <= 1


def test_whole_numbers_are_targets_of_losses_of_numbers() -> None:
    model = nn.Sequential(nn.Linear(8, 1), nn.Flatten(0))
    made = task((X, Y), nn.MSELoss(), model)
    assert made.train.__getitems__([0])["y"].dtype == torch.float32
    train(made, 3)


def test_targets_keep_their_digits_beside_a_narrow_network() -> None:
    years = torch.tensor([1993.0, 2007.0])
    made = task((X[:2], years), nn.MSELoss(), nn.Sequential(nn.Linear(8, 1), nn.Flatten(0)))
    loss = made.loss(torch.zeros(2, dtype=torch.bfloat16), {"x": X[:2], "y": years})
    assert loss.item() == pytest.approx((1993**2 + 2007**2) / 2)
    assert made.loss(torch.zeros(2, dtype=torch.float64), {"y": years}).dtype == torch.float64


def test_bce_of_a_narrow_network_and_class_weights_in_every_format() -> None:
    ones = torch.ones(3)
    sigmoid = nn.Sequential(nn.Linear(8, 1), nn.Flatten(0), nn.Sigmoid())
    bce = task((X, (Y > 1).float()), nn.BCELoss(), sigmoid, metric="accuracy")
    weighted = task((X, Y), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3, 4])))
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert bce.evaluate(torch.full((3,), 0.75, dtype=dtype), {"y": ones})["correct"] == 3
        assert weighted.loss_module is weighted.loss_fn
        assert weighted.loss(torch.zeros(3, 4, dtype=dtype), {"y": torch.arange(3)}).item() == pytest.approx(
            1.3863, 1e-3
        )


class Gives(nn.Module):
    def __init__(self, also: Callable[[Tensor, bool], Any]) -> None:
        super().__init__()
        self.layer, self.also = nn.Linear(8, 4), also

    def forward(self, x: Tensor) -> Any:
        return self.also(self.layer(x), self.training)


@pytest.mark.parametrize(
    ("also", "sentence"),
    [
        (lambda out, training: (out, out), "must give one tensor in eval mode, but it gives a tuple of 2"),
        (lambda out, training: {"logits": out}, "it gives a dict of logits: return the logits alone"),
        (lambda out, training: [out], "it gives a list of 1"),
        (
            lambda out, training: (out, out) if training else out,
            "must give one tensor in training mode, but it gives a tuple of 2: return the logits alone",
        ),
        (lambda out, training: {"logits": out} if training else out, "in training mode, but it gives a dict of logits"),
    ],
)
def test_outputs_that_are_no_tensor_are_refused_when_built(also: Any, sentence: str) -> None:
    def loss(output: Any, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output if isinstance(output, Tensor) else output[0], y)

    with pytest.raises(ValueError, match=sentence):
        task((X, Y), loss, Gives(also))


def test_looking_at_the_training_mode_leaves_no_trace() -> None:
    class Teacher(nn.Module):
        """Follows itself in training: weights that a pass writes, running statistics, a count of passes."""

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(8, 4), nn.BatchNorm1d(4)
            self.slow = nn.Linear(8, 4).requires_grad_(False)
            self.passes = 0

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.passes += 1
                with torch.no_grad():
                    self.slow.weight.lerp_(self.layer.weight, 0.5)
            return self.norm(self.layer(x) + self.slow(x) + torch.rand(()))

    model = Teacher()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    assert task((X, Y), model=model).model.training
    assert model.passes == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("data", "loss_fn", "sentence"),
    [
        ((X, Y + 1), None, r"sample \d+ of train from f has the class 4, but the model gives 4 classes \(0 to 3\)"),
        ((X, Y[:, None]), None, "loss_fn from f fails for outputs .*2, 4.* and targets .*2, 1"),
        ((X, X[:, :1]), nn.MSELoss(), "would broadcast outputs .*2, 4.* and targets .*2, 1"),
        (
            (X, Y),
            lambda output, y: output.sum(1),
            r"must give the mean over the samples, one number; it gives shape \[2\]",
        ),
        ((X, Y), nn.AdaptiveLogSoftmaxWithLoss(4, 8, [2]), "has parameters of its own"),
    ],
)
def test_losses_and_targets_that_misfit_are_refused(data: Any, loss_fn: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        task(data, loss_fn)


@given(
    seed=st.integers(0, 500),
    shape=st.sampled_from([(6,), (6, 3), (6, 2, 3)]),
    last=st.booleans(),
    parts=st.integers(1, 6),
)
@settings(max_examples=40, deadline=None)
def test_accuracy_is_a_fraction_of_targets_for_any_number_of_parts(
    seed: int, shape: tuple[int, ...], last: bool, parts: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(*shape, 5, generator=draw)
    target = torch.randint(0, 5, shape, generator=draw)
    target = target.masked_fill(torch.rand(shape, generator=draw) < 0.3, -100)
    counted = [(s, t) for s, t in zip(scores.flatten(0, -2), target.flatten(), strict=True) if t >= 0]
    expected = sum(int(s.argmax() == t) for s, t in counted)
    output = scores if last else scores.movedim(-1, 1)
    loss_fn = (lambda output, y: output.sum()) if last else nn.CrossEntropyLoss()
    right = total = 0
    for out, part in zip(output.chunk(parts), target.chunk(parts), strict=True):
        a, b = correct_and_counted(loss_fn, out, part)
        right, total = right + int(a), total + int(b)
    assert (right, total) == (expected, len(counted))


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
@pytest.mark.parametrize(
    ("loss_fn", "border"),
    [
        (nn.BCEWithLogitsLoss(pos_weight=torch.tensor(9.0)), 0.0),
        (lambda output, y: nn.functional.binary_cross_entropy_with_logits(output.flatten(), y.flatten()), 0.0),
        (nn.BCELoss(), 0.5),
        (lambda output, y: nn.functional.binary_cross_entropy(output, y), 0.5),
        (nn.MSELoss(), 0.5),
    ],
)
def test_one_score_is_compared_with_the_border_of_its_loss(shape: tuple[int, ...], loss_fn: Any, border: float) -> None:
    score = (border + torch.tensor([0.1, -0.1, 0.2, -0.2, 0.3, -0.3])).reshape(shape)
    target = torch.tensor([1.0, 0, 0, 1, 1, 0]).reshape(shape)
    right, counted = correct_and_counted(loss_fn, score, target)
    assert (int(right), int(counted)) == (4, 6)


@pytest.mark.parametrize(
    ("output", "target"),
    [((6, 4), (6, 1)), ((6, 4), (6, 4)), ((6, 3, 5), (6, 4)), ((6,), (6, 2)), ((6, 2, 2, 5), (6, 2))],
)
def test_other_shapes_are_refused(output: tuple[int, ...], target: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="accuracy is not defined for outputs"):
        correct_and_counted(len, torch.zeros(output), torch.zeros(target, dtype=torch.int64))
    with pytest.raises(ValueError, match="needs targets of 0 and 1, but they go from 0 to 5"):
        correct_and_counted(nn.MSELoss(), torch.zeros(6), torch.arange(6.0))


class Tokens(nn.Module):
    """Attention over all tokens, or over the earlier ones."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.embed = nn.Embedding(10, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.out = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]) if self.causal else None
        return self.out(self.layer(self.embed(x), src_mask=mask, is_causal=self.causal))


@pytest.mark.parametrize("transposed", [False, True])
def test_ones_own_model_that_sees_the_next_token_is_refused(transposed: bool) -> None:
    text = torch.randint(0, 10, (20, 13), generator=torch.Generator().manual_seed(1))
    data = text[:, :-1], text[:, 1:]

    def loss(output: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output.flatten(0, 1), y.flatten())

    class Turned(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).transpose(1, 2)

    kind, loss_fn = (Turned, nn.CrossEntropyLoss()) if transposed else (Tokens, loss)
    with pytest.raises(ValueError, match="the model from f is not a causal model: changing token"):
        task(data, loss_fn, kind(causal=False))
    assert task(data, loss_fn, kind(causal=True), metric="accuracy").measures_accuracy


def test_ignored_targets_count_in_no_metric() -> None:
    y = Y.clone()
    y[::3] = -100
    made = task((X, y))
    metrics = evaluate(made, batch=7)
    output = made.model(X).detach()
    valid = y >= 0
    assert metrics["loss"] == pytest.approx(nn.functional.cross_entropy(output, y).item(), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx((output.argmax(1) == y)[valid].float().mean().item())
    assert evaluate(made, parts=3) == pytest.approx(metrics, rel=1e-5)
    empty = made.evaluate(output[:2], {"x": X[:2], "y": torch.full((2,), -100)})
    assert float(empty["loss"]) == float(empty["weight"]) == float(empty["targets"]) == 0.0
