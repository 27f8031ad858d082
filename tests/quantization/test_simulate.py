"""Fewer bits lose more, and the copy says that it is emulated."""

from __future__ import annotations

import pytest
import torch

from labkit.quantization.simulate import simulate, with_bits
from tests.quantization.networks import small, tokens


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_row_has_as_many_values_as_the_bits_allow(bits: int) -> None:
    seen = with_bits(torch.randn(4, 5000, generator=torch.Generator().manual_seed(0)), bits)
    expected = 2 if bits == 1 else 2**bits - 1
    assert all(expected * 0.7 <= len(row.unique()) <= expected for row in seen)


def test_fewer_bits_lose_more_and_nothing_happens_to_the_model() -> None:
    model, x = small(), tokens()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    right = model(x)
    found = [simulate(model, bits) for bits in range(8, 0, -1)]
    errors = [one.error for one in found]
    assert errors == sorted(errors)
    assert errors[0] < 0.01
    assert errors[-1] > 0.3
    assert {one.badge for one in found} == {"emulated"}
    assert found[0].layers == ("first", "second", "back")
    assert float(((found[0].model(x) - right).norm() / right.norm()).detach()) < 0.02
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "head" in simulate(model, 4, head=True).layers


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_other_bits_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="1 to 8 bits"):
        simulate(small(), bits)
