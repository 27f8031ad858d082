"""Whatever is packed comes out again, in as many bytes as the formula says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labkit.gradients.compression.packing import (
    join_bytes,
    pack,
    pack_signs,
    packed_bytes,
    split_bytes,
    unpack,
    unpack_signs,
)


@st.composite
def digits(draw: st.DrawFn) -> tuple[int, list[int]]:
    bits = draw(st.sampled_from([1, 2, 4]))
    return bits, draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=70))


@given(digits())
def test_digits_come_back(case: tuple[int, list[int]]) -> None:
    bits, given_digits = case
    packed = pack(torch.tensor(given_digits, dtype=torch.uint8), bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_bytes(len(given_digits), bits) == -(-len(given_digits) * bits // 8)
    found = unpack(packed, len(given_digits), [float(value) for value in range(2**bits)], torch.float32)
    assert found.tolist() == given_digits


@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_bits_lie_as_numpy_packs_them(bits: list[bool]) -> None:
    assert pack(torch.tensor(bits), 1).tolist() == np.packbits(bits, bitorder="little").tolist()


@given(
    st.lists(
        st.tuples(st.sampled_from([torch.uint8, torch.int32, torch.float32, torch.float16]), st.integers(0, 9)),
        min_size=1,
        max_size=5,
    )
)
def test_a_message_comes_apart_as_it_was_joined(kinds: list[tuple[torch.dtype, int]]) -> None:
    parts = [torch.arange(count).to(dtype) for dtype, count in kinds]
    message = join_bytes(*parts)
    assert len(message) == sum(part.numel() * part.element_size() for part in parts)
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), message])[1:]  # at an odd address
    for part, found in zip(parts, split_bytes(shifted, [(len(part), part.dtype) for part in parts]), strict=True):
        assert found.dtype == part.dtype
        assert found.tolist() == part.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_signs_carry_their_rows_mean_magnitude(dtype: torch.dtype) -> None:
    rows = torch.randn(3, 24, dtype=dtype, generator=torch.Generator().manual_seed(0))
    message = pack_signs(rows)
    assert message.shape == (3, 4 + 3)
    found = unpack_signs(message, 24, dtype)
    assert found.dtype == dtype
    assert torch.equal(found.sign(), rows.sign())
    assert torch.allclose(found.abs(), rows.abs().mean(1, keepdim=True).expand_as(rows))
