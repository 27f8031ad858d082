"""What is remembered belongs to a parameter, in whatever bucket it lies."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from labkit.gradients.compression.compressor import GradientBucket
from labkit.gradients.compression.error_feedback import ErrorFeedback


def buckets(parameters: list[Tensor], cut: int) -> list[GradientBucket]:
    groups = [group for group in (parameters[:cut], parameters[cut:]) if group]
    return [
        GradientBucket(
            torch.zeros(sum(p.numel() for p in group)), tuple(group), tuple(tuple(p.shape) for p in group), 0, number
        )
        for number, group in enumerate(groups)
    ]


@given(st.lists(st.integers(1, 6), min_size=2, max_size=6), st.data())
def test_it_survives_being_dealt_out_anew(sizes: list[int], data: st.DataObject) -> None:
    parameters, memory = [torch.zeros(size) for size in sizes], ErrorFeedback()
    for number in range(4):
        order = data.draw(st.permutations(range(len(sizes))))
        for bucket in buckets([parameters[place] for place in order], data.draw(st.integers(0, len(sizes)))):
            flat = memory.of(bucket)
            for parameter, view in zip(bucket.parameters, bucket.views(flat), strict=True):
                place = next(place for place, one in enumerate(parameters) if one is parameter)
                # What was written in the round before, wherever it stood.
                assert view.tolist() == [(place + 1) * number] * sizes[place]
                view.fill_((place + 1) * (number + 1))


def test_the_same_bundle_finds_the_same_memory() -> None:
    parameters, memory = [torch.zeros(3), torch.zeros(2)], ErrorFeedback()
    [bucket] = buckets(parameters, 2)
    memory.of(bucket).fill_(7)
    assert memory.of(buckets(parameters, 2)[0]).data_ptr() == memory.of(bucket).data_ptr()
    assert memory.of(bucket).tolist() == [7] * 5
