from __future__ import annotations

import pytest
import torch
from torch import nn

from labkit.workloads import digits
from labkit.workloads.images import Shifted, digit_images
from labkit.workloads.vision import DIGITS_TRAIN, Vision
from tests.workloads.helpers import assert_split_equals_whole, evaluate, reasons, train

NETWORKS = [{"model": "resnet", "width": 8}, {"model": "vit", "width": 16, "depth": 2}]


def test_the_held_out_digits_are_others_and_every_class_gives_a_fifth() -> None:
    train_rows, test_rows = digits.split()
    labels = digits.raw()[1]
    assert not set(train_rows) & set(test_rows)
    assert len(train_rows) + len(test_rows) == len(labels) == digits.COUNT
    assert len(train_rows) == DIGITS_TRAIN
    for digit in range(10):
        total = (labels == digit).sum()
        assert abs((labels[test_rows] == digit).sum() - 0.2 * total) <= 1


def test_digits_are_resized_and_normalised() -> None:
    images = digit_images(32)
    x = images.train.__getitems__(range(len(images.train)))["x"]
    assert x.shape == (DIGITS_TRAIN, 1, 32, 32)
    assert abs(x.mean().item()) < 1e-4
    assert abs(x.std().item() - 1) < 1e-4
    # Averaging each 4×4 patch of the enlarged picture gives the 8×8 original back, up to the blur of the resize.
    small = nn.functional.avg_pool2d(x, 4).flatten(1)
    original = torch.from_numpy(digits.raw()[0])[digits.split()[0]].flatten(1)
    assert torch.corrcoef(torch.stack([small.flatten(), original.flatten()]))[0, 1] > 0.97


def test_shifted_pictures_keep_their_label_and_move_by_whole_pixels() -> None:
    base = digit_images(16).test
    moved = Shifted(base, 2)
    assert len(moved) == 25 * len(base)
    whole = base.__getitems__([3])["x"][0, 0]
    for row in range(5):
        for column in range(5):
            sample = moved.__getitems__([3 + len(base) * (5 * row + column)])
            dy, dx = 2 - row, 2 - column
            picture = sample["x"][0, 0]
            inside = picture[max(0, dy) : 16 + min(0, dy), max(0, dx) : 16 + min(0, dx)]
            source = whole[max(0, -dy) : 16 + min(0, -dy), max(0, -dx) : 16 + min(0, -dx)]
            assert torch.equal(inside, source)
            assert sample["y"].item() == base.__getitems__([3])["y"].item()
    everything = moved.__getitems__([7, 7 + len(base), 7])
    assert torch.equal(everything["x"][0], everything["x"][2])


@pytest.mark.parametrize("options", NETWORKS, ids=lambda o: o["model"])
def test_the_chain_of_blocks_is_the_network(options: dict) -> None:
    task = Vision.build(options, 0)
    names = list(task.model.blocks)
    assert (names[0], names[-1]) == ("stem", "head")
    x = task.test.__getitems__(range(5))["x"]
    step = x
    for name in names:
        step = task.model.blocks[name](step)
    assert torch.equal(step, task.model(x))
    assert step.shape == (5, 10)


@pytest.mark.parametrize("options", NETWORKS, ids=lambda o: o["model"])
def test_gradients_of_a_split_batch_average_to_those_of_the_whole(options: dict) -> None:
    task = Vision.build(options, 0)
    assert_split_equals_whole(task, task.train.__getitems__(range(0, 7000, 1000)), [4, 2, 1])


def test_batch_normalisation_would_break_that() -> None:
    task = Vision.build(NETWORKS[0], 0)
    task.model.blocks["stem"][1] = nn.BatchNorm2d(8)
    with pytest.raises(AssertionError):
        assert_split_equals_whole(task, task.train.__getitems__(range(0, 7000, 1000)), [4, 2, 1])


def test_the_seed_decides_the_weights_and_nothing_else_is_disturbed() -> None:
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    first, again, other = (Vision.build(NETWORKS[0], seed).model.state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.stem.0.weight"], other["blocks.stem.0.weight"])


@pytest.mark.parametrize("options", NETWORKS, ids=lambda o: o["model"])
@pytest.mark.parametrize("size", [8, 28, 48])
def test_other_sizes_of_picture(options: dict, size: int) -> None:
    task = Vision.build(options | {"image_size": size, "patch": 4}, 0)
    assert task.model(task.train.__getitems__([0, 1])["x"]).shape == (2, 10)


def test_a_short_training_beats_the_majority_by_far() -> None:
    task = Vision.build({"width": 8, "image_size": 16, "shift": 0}, 0)
    train(task, 60, 64, 4e-3)
    result = evaluate(task)
    assert result["accuracy"] > 0.8 > 5 * task.facts()["majority_share"]
    assert evaluate(task, batch=50, parts=3) == pytest.approx(result, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "training", "sentence"),
    [
        (
            {"model": "vit", "width": 50},
            {},
            "workload.heads: 4 heads do not divide a width of 50; nearest legal value: 5.",
        ),
        ({"model": "vit", "patch": 5}, {}, "workload.patch: patches of 5 pixels do not divide images of 32; "),
        ({"shift": 0}, {"global_batch": 5000}, "training.global_batch: the training set has 1438 samples, fewer than"),
        (
            {"data": "./nowhere"},
            {},
            "workload.data: there is no file or folder ./nowhere; nearest legal value: digits.",
        ),
        ({"data": "what is this?"}, {}, "workload.data: 'what is this?' is neither a path nor a data set's name"),
    ],
)
def test_what_cannot_be_built_is_refused_in_a_sentence(options: dict, training: dict, sentence: str) -> None:
    found = reasons({"name": "vision"} | options, **training)
    assert len(found) == 1
    assert found[0].startswith(sentence)


@pytest.mark.parametrize("options", [{}, {"model": "vit"}, {"image_size": 16}])
def test_what_can_be_built_is_not_refused(options: dict) -> None:
    assert reasons({"name": "vision"} | options) == []
