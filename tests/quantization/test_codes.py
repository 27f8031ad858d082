"""Grids hold what they promise: how many numbers, how far the nearest is, and a mean that stochastic rounding keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.quantization import codes

DRAWS = 4000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


@pytest.mark.parametrize("dim", [0, 1])
def test_int8_is_never_further_than_half_a_step_and_keeps_the_largest(dim: int) -> None:
    x = normal(40, 70)
    found, scale = codes.int8_codes(x, dim)
    assert found.dtype == torch.int8
    back = found * scale
    assert ((back - x).abs() <= scale * 0.5001).all()
    assert (found.abs().amax(dim) == 127).all()


def test_zeros_stay_zeros() -> None:
    for found in (codes.on_int8(torch.zeros(3, 5)), codes.on_int4(torch.zeros(3, 40))):
        assert (found == 0).all()


def test_a_number_on_the_grid_stays_where_it_is() -> None:
    once = codes.on_int8(normal(30, 50))
    torch.testing.assert_close(codes.on_int8(once), once, rtol=1e-6, atol=0)
    assert torch.equal(codes.int8_codes(codes.on_int8(once))[0], codes.int8_codes(once)[0])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 100), st.integers(1, 9))
def test_int4_packs_two_codes_in_a_byte_for_any_number_of_inputs(inputs: int, outputs: int) -> None:
    weight = normal(outputs, inputs)
    found, scale = codes.int4_codes(weight)
    packed = codes.pack_int4(found)
    assert packed.dtype == torch.uint8
    assert packed.numel() * 2 == found.numel()
    assert torch.equal(codes.unpack_int4(packed), found)
    back = codes.from_int4(found, scale, inputs)
    assert back.shape == weight.shape
    step = scale.expand_as(found).flatten(1)[:, :inputs]
    assert ((back - weight).abs() <= step * 0.5001).all()


def test_ternary_has_three_values_and_the_mean_magnitude() -> None:
    weight = normal(60, 60)
    found, scale = codes.ternary_codes(weight)
    assert sorted(found.unique().tolist()) == [-1, 0, 1]
    assert scale == weight.abs().mean()


@settings(max_examples=20, deadline=None)
@given(st.floats(-5, 5, allow_subnormal=False), st.integers(0, 2**31))
def test_stochastic_rounding_keeps_the_mean(value: float, seed: int) -> None:
    x = torch.full((DRAWS,), value)
    found = codes.rounded(x, generator(seed))
    assert set(found.unique().tolist()) <= {float(x[0].floor()), float(x[0].floor()) + 1}
    assert abs(float(found.double().mean()) - float(x[0])) < 5 * 0.5 / DRAWS**0.5


@settings(max_examples=20, deadline=None)
@given(st.floats(1e-3, 1e3), st.sampled_from([-1, 1]), st.integers(0, 2**31))
def test_stochastic_bfloat16_keeps_the_mean_and_nearest_does_not(value: float, sign: int, seed: int) -> None:
    x = torch.full((DRAWS,), sign * value)
    found = codes.to_bfloat16(x, generator(seed))
    assert found.dtype == torch.bfloat16
    neighbours = found.float().unique()
    assert len(neighbours) <= 2
    step = float(neighbours.max() - neighbours.min())
    assert abs(float(found.double().mean()) - float(x[0])) <= 5 * step / DRAWS**0.5 + 1e-6 * value
    assert float(neighbours.min()) <= float(x[0]) <= float(neighbours.max())


def test_nearest_bfloat16_has_a_bias_that_stochastic_rounding_has_not() -> None:
    x = torch.full((DRAWS,), 1.001)
    assert float(codes.to_bfloat16(x).double().mean()) == 1.0
    assert abs(float(codes.to_bfloat16(x, generator()).double().mean()) - 1.001) < 3e-4


def test_what_is_not_finite_stays_so() -> None:
    x = torch.tensor([float("inf"), -float("inf"), float("nan")])
    assert torch.equal(codes.to_bfloat16(x, generator()).isnan(), x.isnan())
    assert torch.equal(codes.to_bfloat16(x, generator())[:2].float(), x[:2])


def test_the_same_seed_draws_the_same() -> None:
    x = normal(100)
    assert torch.equal(codes.to_bfloat16(x, generator(3)), codes.to_bfloat16(x, generator(3)))
    assert not torch.equal(codes.to_bfloat16(x, generator(3)), codes.to_bfloat16(x, generator(4)))
