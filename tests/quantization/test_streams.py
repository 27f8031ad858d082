"""Random numbers for one purpose are not those for another (issue 12). CPU, one process."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from labkit.experiment.random_streams import Stream, stream_seed

PLACES = st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 10**7), st.integers(0, 4098))


@given(PLACES)
def test_rounding_draws_other_numbers_than_dropout(place: tuple[int, int, int]) -> None:
    seed, step, share = place
    torch.manual_seed((seed * 1_000_003 + step) * 4099 + share)  # as the trainer seeds a step
    dropout = torch.rand(4)
    for stream in Stream:
        generator = torch.Generator().manual_seed(stream_seed(seed, stream, step, share))
        assert not torch.equal(torch.rand(4, generator=generator), dropout)


@given(PLACES, PLACES)
def test_streams_and_places_have_seeds_of_their_own(first: tuple[int, int, int], second: tuple[int, int, int]) -> None:
    seeds = {stream_seed(first[0], stream, *first[1:]) for stream in Stream}
    assert len(seeds) == len(Stream)
    assert all(0 <= seed < 2**63 for seed in seeds)
    if first != second:
        assert stream_seed(first[0], Stream.LAYER_ROUNDING, *first[1:]) != stream_seed(
            second[0], Stream.LAYER_ROUNDING, *second[1:]
        )
