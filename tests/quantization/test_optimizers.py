"""Optimizers for narrow numbers: the formulas of torch, small updates kept, moments in a quarter of the bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from labkit.experiment import Optimizer
from labkit.quantization import eight_bit
from labkit.quantization.optimizers import Narrow, NarrowAdamW, NarrowSGD
from labkit.training.optimizers import make_optimizer

SETTINGS: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}


def made(settings: Optimizer, shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    parameters = [
        nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype)) for shape in shapes
    ]
    kind = NarrowAdamW if settings.name == "adamw" else NarrowSGD
    pairs = [(parameter, parameter.dim() > 1) for parameter in parameters]
    return parameters, pairs, make_optimizer(settings, pairs, lambda groups: kind(groups, settings, seed))


def train(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        for number, parameter in enumerate(parameters):
            noise = torch.Generator().manual_seed(1000 * step + number)
            parameter.grad = (0.3 * parameter.detach().float() + torch.randn(parameter.shape, generator=noise)).to(
                parameter.dtype
            )
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_in_float32_they_are_those_of_torch(name: Any, momentum: float) -> None:
    settings = Optimizer(name=name, momentum=momentum, beta1=momentum, **SETTINGS)
    mine, pairs, optimizer = made(settings, [(40, 30), (5,)])
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in mine]
    reference = make_optimizer(settings, [(one, decays) for one, (_, decays) in zip(theirs, pairs, strict=True)])
    train(mine, optimizer, 0, 20)
    train(theirs, reference, 0, 20)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_small_updates_of_bfloat16_weights_add_up_at_random_and_vanish_to_the_nearest(name: Any) -> None:
    """A weight of 1 has neighbours at 1/128 above and 1/256 below; 200 updates of 1/2000 each make a tenth."""
    settings = Optimizer(name=name, lr=1 / 2000, weight_decay=0, momentum=0, beta1=0)
    weight = nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
    nearest = nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
    kind = NarrowAdamW if name == "adamw" else NarrowSGD
    narrow = kind([{"params": [weight], "weight_decay": 0.0}], settings, 0)
    plain = make_optimizer(settings, [(nearest, False)])
    for _ in range(200):
        for parameter, optimizer in ((weight, narrow), (nearest, plain)):
            parameter.grad = torch.full_like(parameter, -1.0)
            optimizer.step()
    assert (nearest == 1).all(), "torch rounds to the nearest, and nothing ever moves"
    assert float(weight.detach().float().mean()) == pytest.approx(1.1, abs=0.003)


def test_ranks_with_one_seed_stay_equal_and_steps_draw_differently() -> None:
    settings = Optimizer(**SETTINGS)
    runs = []
    for seed in (0, 0, 1):
        parameters, _, optimizer = made(settings, [(40, 30), (40, 30)], torch.bfloat16, seed)
        train(parameters, optimizer, 0, 10)
        runs.append(parameters)
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))


# -- eight bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_near_right_in_the_mean_and_never_lose_a_denominator(signed: bool) -> None:
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(3000, generator=noise) * 10 ** (2 * torch.randn(3000, generator=noise)) * 1e-6
    x[:300] = 0
    x = x if signed else x.square()
    found = torch.stack([eight_bit.unpack(*eight_bit.pack(x, signed, noise), signed, x) for _ in range(300)])
    largest = torch.nn.functional.pad(x.abs(), (0, -3000 % 256)).view(-1, 256).amax(1).repeat_interleave(256)[:3000]
    shown = x.abs() > largest * 2.0 ** -(10 if signed else 20)
    error = ((found - x).abs() / x.abs())[:, shown]
    assert error.max() < 0.06
    assert (found.mean(0) - x).abs()[shown].div(x.abs()[shown]).max() < 0.012, "unbiased"
    assert (found[:, x == 0] == 0).all()
    if not signed:
        assert (found[:, x > 0] > 0).all(), "AdamW divides by its root"


def test_what_was_unpacked_packs_to_itself() -> None:
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(2000, generator=noise)
    once = eight_bit.unpack(*eight_bit.pack(x, True, noise), True, x)
    twice = eight_bit.unpack(*eight_bit.pack(once, True, noise), True, x)
    assert (once != twice).float().mean() < 1e-3


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(v.numel() * v.element_size() for state in optimizer.state.values() for v in state.values() if v.dim())


def test_moments_take_a_quarter_and_training_goes_where_it_goes_with_32_bits() -> None:
    ends, sizes = {}, {}
    for bits in (32, 8):
        parameters, _, optimizer = made(Optimizer(state_bits=bits, **SETTINGS), [(128, 128), (64, 96), (10,)])  # type: ignore[arg-type]
        start = [parameter.detach().clone() for parameter in parameters]
        train(parameters, optimizer, 0, 300)
        ends[bits] = torch.cat([(p.detach() - s).flatten() for p, s in zip(parameters, start, strict=True)])
        sizes[bits] = state_bytes(optimizer)
    assert sizes[8] <= 0.27 * sizes[32]
    assert float((ends[8] - ends[32]).norm() / ends[32].norm()) < 0.1
    assert float(ends[8].norm() / ends[32].norm()) == pytest.approx(1, abs=0.02), "steps are as long"


def test_small_tensors_keep_32_bits() -> None:
    parameters, _, optimizer = made(Optimizer(state_bits=8, **SETTINGS), [(63, 65), (64, 64)])
    train(parameters, optimizer, 0, 1)
    assert set(optimizer.state[parameters[0]]) == {"step", "exp_avg", "exp_avg_sq"}
    assert {v.dtype for k, v in optimizer.state[parameters[1]].items() if "codes" in k} == {torch.uint8}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_that_goes_on_from_unpacked_moments_repeats_the_other_exactly(dtype: torch.dtype) -> None:
    settings = Optimizer(state_bits=8, **SETTINGS)
    parameters, _, optimizer = made(settings, [(80, 80), (5,)], dtype)
    train(parameters, optimizer, 0, 5)
    others, _, resumed = made(settings, [(80, 80), (5,)], dtype)
    for one, other in zip(parameters, others, strict=True):
        other.data.copy_(one.data)
        resumed.state[other] = {key: value.clone() for key, value in optimizer.unpacked(one).items()}
    train(parameters, optimizer, 5, 9)
    train(others, resumed, 5, 9)
    for one, other in zip(parameters, others, strict=True):
        assert torch.equal(one, other)


def test_rounding_is_counted_while_it_is_watched() -> None:
    parameters, _, optimizer = made(Optimizer(**SETTINGS), [(100, 100)], torch.bfloat16)
    assert isinstance(optimizer, Narrow)
    train(parameters, optimizer, 0, 1)
    assert optimizer.rounded == 0
    optimizer.watched = True
    train(parameters, optimizer, 1, 2)
    assert optimizer.rounded == 10_000
    assert 0.1 < optimizer.not_to_nearest / optimizer.rounded < 0.4
