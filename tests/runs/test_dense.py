"""The dense float32 run beside a sparse or narrow one differs from it in nothing that matters for speed."""

from __future__ import annotations

import pytest

from labkit.experiment import Experiment
from labkit.runs import dense

BASE = Experiment().replace("launch.device=cpu", "training.steps=50")
NARROW = BASE.replace("quantization.training=int8")


@pytest.mark.parametrize(
    "change",
    ["quantization.training=bf16", "quantization.qat=int8", "optimizer.state_bits=8", "sparsity.method=n_m"],
)
def test_what_is_dense_float32(change: str) -> None:
    assert dense.is_dense(BASE)
    assert dense.is_dense(BASE.replace("quantization.after_training=int8_dynamic"))
    assert not dense.is_dense(BASE.replace(change))


@pytest.mark.parametrize(
    "change",
    [
        "layout=dp2",
        "training.global_batch=32",
        "workload.model=vit",
        "launch.threads_per_rank=3",
        "gradients.overlap=false",
    ],
)
def test_another_layout_or_batch_is_no_comparison(change: str) -> None:
    assert dense.find_dense_reference(NARROW, [BASE.replace(change)]) is None
    assert dense.find_dense_reference(NARROW, [None, BASE.replace(change), BASE]) == 2


def test_of_several_the_one_that_trained_as_long() -> None:
    others = [BASE.replace("training.steps=10"), NARROW, BASE.replace("training.seed=3"), BASE]
    assert dense.find_dense_reference(NARROW, others) == 3
    assert dense.find_dense_reference(NARROW, others[:3]) in (0, 2)
    assert dense.find_dense_reference(NARROW, [NARROW]) is None
