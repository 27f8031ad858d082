"""Parts of a batch, each with its mean loss and its weight, are the loss of the whole batch."""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from labkit.workloads.weights import _MODULES, as_module, batch_weight, mean_loss

CLASSES = 5
WEIGHTS = torch.tensor([0.2, 3.0, 1.0, 0.5, 7.0], dtype=torch.float64)

LOSSES_OF_CLASSES: list[Any] = [
    nn.CrossEntropyLoss(),
    nn.CrossEntropyLoss(weight=WEIGHTS),
    nn.CrossEntropyLoss(ignore_index=2),
    nn.CrossEntropyLoss(weight=WEIGHTS, ignore_index=2),
    nn.CrossEntropyLoss(label_smoothing=0.3),
    nn.CrossEntropyLoss(weight=WEIGHTS, ignore_index=-1, label_smoothing=0.3),
    functional.cross_entropy,
    functools.partial(functional.cross_entropy, weight=WEIGHTS, ignore_index=0),
    functools.partial(functional.nll_loss, weight=WEIGHTS),
    nn.NLLLoss(ignore_index=3),
    nn.NLLLoss(weight=WEIGHTS, ignore_index=3),
]


def named(loss_fn: Any) -> str:
    """Return a name without the address in memory that functions show: workers of one session must agree on it."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(loss_fn))


def united(loss_fn: Any, output: Tensor, target: Tensor, size: int) -> Tensor:
    """The weighted mean of the losses of parts of `size` samples."""
    total, weights = output.new_zeros(()), output.new_zeros(())
    for out, part in zip(output.split(size), target.split(size), strict=True):
        weight = torch.as_tensor(batch_weight(loss_fn, part))
        total, weights = total + mean_loss(loss_fn, out, part) * weight, weights + weight
    return total / weights


@pytest.mark.parametrize("loss_fn", LOSSES_OF_CLASSES, ids=named)
@given(seed=st.integers(0, 1000), size=st.integers(1, 9), length=st.sampled_from([None, 3]))
@settings(max_examples=15, deadline=None)
def test_parts_of_class_targets_add_up_to_torchs_own_mean(
    loss_fn: Any, seed: int, size: int, length: int | None
) -> None:
    draw = torch.Generator().manual_seed(seed)
    shape = (12,) if length is None else (12, length)
    output = torch.randn(12, CLASSES, *shape[1:], dtype=torch.float64, generator=draw).log_softmax(1)
    target = torch.randint(0, CLASSES, shape, generator=draw)
    ignored = inspect.signature(loss_fn).parameters.get("ignore_index", None) if callable(loss_fn) else None
    index = getattr(loss_fn, "ignore_index", None)
    if index is None:
        index = ignored.default if ignored is not None else -100
    target = torch.where(torch.rand(shape, generator=draw) < 0.3, index, target)
    target[0] = 4  # one that counts with every loss here
    expected = output.clone().requires_grad_()
    found = output.clone().requires_grad_()
    loss_fn(expected, target).backward()
    module = as_module(loss_fn)
    united(module, found, target, size).backward()
    torch.testing.assert_close(united(module, output, target, size), loss_fn(output, target), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "loss_fn",
    [
        nn.CrossEntropyLoss(weight=WEIGHTS),
        nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.2),
        nn.BCELoss(),
        nn.BCELoss(weight=WEIGHTS),
        nn.BCEWithLogitsLoss(pos_weight=WEIGHTS),
        nn.MSELoss(),
        nn.L1Loss(),
        nn.SmoothL1Loss(beta=0.3),
        nn.HuberLoss(),
        nn.KLDivLoss(),
        nn.KLDivLoss(reduction="batchmean"),
        nn.PoissonNLLLoss(),
        nn.SoftMarginLoss(),
        nn.MultiLabelSoftMarginLoss(weight=WEIGHTS),
        nn.HingeEmbeddingLoss(),
        lambda output, target: (output - target).abs().mean(),
    ],
    ids=named,
)
def test_losses_of_numbers_are_means_over_samples(loss_fn: Any) -> None:
    output = torch.rand(7, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    target = torch.rand(7, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    if isinstance(loss_fn, nn.HingeEmbeddingLoss | nn.SoftMarginLoss):
        target = (target > 0.5) * 2.0 - 1.0
    torch.testing.assert_close(united(loss_fn, output, target, 3), loss_fn(output, target), rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss_fn", LOSSES_OF_CLASSES, ids=named)
def test_a_batch_of_ignored_targets_counts_nothing_and_is_a_number(loss_fn: Any) -> None:
    module = as_module(loss_fn)
    output = torch.randn(3, CLASSES, dtype=torch.float64, requires_grad=True)
    target = torch.full((3,), module.ignore_index)
    assert float(batch_weight(module, target)) == 0.0
    loss = mean_loss(module, output, target)
    loss.backward()
    assert loss.item() == 0.0
    assert output.grad is not None
    assert output.grad.abs().max() == 0.0


def test_every_function_of_torch_is_the_module_that_computes_the_same() -> None:
    for function, kind in _MODULES.items():
        assert isinstance(as_module(function), kind)
    odd = functools.partial(functional.cross_entropy, torch.zeros(1, 2))
    assert as_module(odd) is odd
    weighted = as_module(functools.partial(functional.cross_entropy, weight=WEIGHTS.float()))
    assert weighted.double().weight.dtype == torch.float64  # moves and is cast like a model


class Doubled(nn.CrossEntropyLoss):
    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return 2 * functional.cross_entropy(output, target)


def test_a_subclass_with_its_own_forward_pass_is_of_unknown_kind() -> None:
    assert batch_weight(Doubled(ignore_index=1), torch.tensor([1, 1, 0])) == 3.0
