"""Learning rates over time, and what decays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from labkit.experiment import Optimizer
from labkit.parallel.decay import with_decay_flags
from labkit.training.optimizers import learning_rate, make_optimizer, set_learning_rate


def rates(steps: int, **settings: Any) -> list[float]:
    return [learning_rate(Optimizer(**settings), step, steps) for step in range(steps)]


def test_the_warm_up_rises_in_equal_steps_to_the_full_rate() -> None:
    found = rates(10, lr=1.0, warmup_steps=4, schedule="constant")
    assert found == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1])


def test_linear_and_cosine_fall_from_the_full_rate_towards_zero() -> None:
    assert rates(4, lr=2.0, schedule="linear") == pytest.approx([2, 1.5, 1, 0.5])
    assert rates(4, lr=2.0, schedule="cosine") == pytest.approx([2, 1.7071068, 1, 0.2928932])
    assert learning_rate(Optimizer(lr=2.0, schedule="cosine"), 4, 4) == pytest.approx(0, abs=1e-12)


@given(
    st.integers(1, 300),
    st.integers(0, 400),
    st.sampled_from(["constant", "cosine", "linear"]),
    st.floats(1e-6, 10),
)
def test_a_rate_is_positive_and_never_above_the_highest(steps: int, warmup: int, schedule: str, lr: float) -> None:
    found = rates(steps, lr=lr, warmup_steps=warmup, schedule=schedule)
    assert all(0 < rate <= lr * (1 + 1e-12) for rate in found)
    rising, falling = found[:warmup], found[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert not falling or falling[0] == pytest.approx(lr)


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_biases_and_gains_do_not_decay(name: Any, kind: type) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    model[1].weight.requires_grad_(False)
    chosen = {"momentum": 0.8} if name == "sgd" else {"beta1": 0.8, "beta2": 0.95}
    optimizer = make_optimizer(
        Optimizer(name=name, lr=0.5, weight_decay=0.1, eps=1e-6, **chosen), with_decay_flags(model.parameters())
    )
    assert isinstance(optimizer, kind)
    decayed, plain = optimizer.param_groups
    assert [p.shape for p in decayed["params"]] == [(2, 3)]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert len(plain["params"]) == 2, "two biases; what is frozen is left out"
    if name == "adamw":
        assert (plain["betas"], plain["eps"]) == ((0.8, 0.95), 1e-6)
    else:
        assert plain["momentum"] == 0.8
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_trains_parameters_whose_first_gradient_comes_late(momentum: float) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(6, 2, 3, generator=generator)
    weights = [[nn.Parameter(torch.ones(3)) for _ in range(2)] for _ in range(2)]
    by_labkit = make_optimizer(Optimizer(name="sgd", lr=0.1, momentum=momentum), [(w, False) for w in weights[0]])
    by_torch = torch.optim.SGD(weights[1], lr=0.1, momentum=momentum, foreach=False)
    assert by_labkit.defaults["fused"]
    for step, (early, late) in enumerate(gradients):
        for first, second in weights:
            first.grad, second.grad = early.clone(), late.clone() if step >= 2 else None
        by_labkit.step()
        by_torch.step()
    for labkits, torchs in zip(*weights, strict=True):
        torch.testing.assert_close(labkits, torchs, rtol=1e-6, atol=1e-7)
