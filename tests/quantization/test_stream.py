"""Mixed precision in bfloat16: residual stream and messages of a layout take half of the bytes. On the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from labkit.experiment import Experiment
from labkit.launch import launch, warm
from labkit.parallel.shard import _precision
from labkit.workloads.base import Blocks
from labkit.workloads.models.gpt import gpt
from labkit.workloads.models.vit import vit

TOKENS, IMAGES = torch.randint(256, (2, 16)), torch.randn(2, 1, 8, 8)
MODELS = {
    "gpt": (lambda: gpt(256, 16, 32, 2, 4), TOKENS),
    "experts": (lambda: gpt(256, 16, 32, 2, 4, experts=4, capacity=1.5, balance_loss=0.01), TOKENS),
    "vit": (lambda: vit(1, 10, 8, 4, 32, 2, 4), IMAGES),
}


def stream_of(model: Blocks, x: Tensor) -> list[torch.dtype]:
    """Return the dtype of what each block hands to the next."""
    dtypes: list[torch.dtype] = []
    for block in list(model.blocks.values())[:-1]:
        block.register_forward_hook(lambda module, inputs, out: dtypes.append(out.dtype))
    model(x)
    return dtypes


@pytest.mark.parametrize("name", MODELS)
def test_the_stream_is_in_bfloat16_only_where_products_are(name: str) -> None:
    make, x = MODELS[name]
    assert set(stream_of(make(), x)) == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert set(stream_of(make(), x)) == {torch.bfloat16}
    with torch.autocast("cpu", torch.float16):
        assert torch.float16 not in stream_of(make(), x)
    assert set(stream_of(make().double(), x if x.dtype == torch.int64 else x.double())) == {torch.float64}


@pytest.mark.parametrize(
    ("layout", "most"),
    [
        ("layout=shard2 layout.zero_stage=3", 2 / 3),  # two all-gathers in bf16, one reduce-scatter in fp32
        ("layout=tp2", 0.51),
        ("layout=tp2 layout.sequence_parallel=true", 0.52),
        ("layout=pp2 layout.microbatches=2", 0.5),
        ("layout=cp2", 0.87),  # keys and values; their gradients and those of the weights are summed in fp32
    ],
)
def test_messages_take_half_of_the_bytes(layout: str, most: float) -> None:
    sent, losses = [], []
    for training in ("fp32", "bf16"):
        run = launch(experiment_of(layout, training), baseline=None)
        run.result(timeout=120)
        sent.append(run.summary()["communication"]["bytes_per_step"])
        losses.append(float(run.data().loss[-1]))
    assert sent[1] <= most * sent[0]
    assert losses[1] == pytest.approx(losses[0], abs=0.02)


def experiment_of(layout: str, training: str) -> Experiment:
    warm(60)
    base = {
        "workload": {"name": "language", "width": 64, "depth": 4, "heads": 4, "context": 32, "max_characters": 60_000},
        "training.steps": 12,
        "training.global_batch": 8,
        "training.evaluate_every": 0,
        "training.checkpoint_every": 0,
        "training.trace_step": 6,
        "launch.device": "cpu",
    }
    return Experiment().set(base).replace(*layout.split(), f"quantization.training={training}")


class OwnNorm(nn.Module):
    """A layer of somebody's own, of which nobody knows whether it computes with weights in bfloat16."""


@pytest.mark.parametrize(
    ("module", "gathered"),
    [
        (gpt(256, 16, 32, 1, 4), torch.bfloat16),
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), torch.bfloat16),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), None),
        (nn.LSTM(4, 4), None),
        (nn.Sequential(nn.Linear(4, 4), OwnNorm()), None),
    ],
    ids=["gpt", "linear", "batch norm", "recurrent", "own"],
)
def test_weights_are_gathered_in_bfloat16_where_layers_compute_with_that(
    module: nn.Module, gathered: torch.dtype | None
) -> None:
    policy = _precision(module, torch.bfloat16)
    assert policy.param_dtype == gathered
    assert policy.reduce_dtype == (torch.float32 if gathered else None)
    assert _precision(module, None).param_dtype is None
