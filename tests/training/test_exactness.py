"""A model that cannot be exact over ranks is named."""

from __future__ import annotations

import pytest
from torch import nn

from labkit.training.exactness import inexact_parts


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (nn.BatchNorm1d(4), "batch normalisation"),
        (nn.Dropout(0.1), "dropout"),
        (nn.Dropout(0.0), None),
        (nn.GroupNorm(2, 4), None),
        (nn.SyncBatchNorm(4), None),
    ],
)
def test_what_looks_beyond_a_sample_is_named(layer: nn.Module, said: str | None) -> None:
    model = nn.Sequential(nn.Linear(4, 4), layer)
    reasons = inexact_parts(model, ranks=2)
    assert len(reasons) == (said is not None)
    assert all(reason.startswith(f"1: {said}") for reason in reasons)
    assert inexact_parts(model, ranks=1) == []
