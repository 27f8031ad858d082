"""Compiled blocks compute what the blocks compute, and whoever has to see into them can. On the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from labkit.experiment import Experiment
from labkit.training import compiled
from labkit.training.compiled import Compiled, obstacle
from labkit.workloads.models.gpt import gpt

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def model() -> nn.Module:
    torch.manual_seed(0)
    return gpt(16, 8, 16, 2, 2)


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace and differentiate as the compiler does, without making kernels, which takes a minute."""
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_(self, backend="aot_eager"))
    torch._dynamo.reset()


compile_ = nn.Module.compile


@pytest.mark.parametrize(
    ("changes", "device", "least", "expected"),
    [
        ("", GPU, 0, ""),
        ("", GPU, 10**9, "the model is small"),  # too small to win back what compiling takes
        ("", CPU, 0, "not on a GPU"),
        ("launch.compile=off", GPU, 0, "switched off"),
        ("launch.compile=blocks", CPU, 10**9, ""),
        ("layout=shard2 quantization.training=bf16", GPU, 0, ""),
        ("layout=tp2·pp2", GPU, 0, "blocks are split by tp and pp"),
        ("quantization.training=int8", GPU, 0, "int8 computes with operations of labkit"),
        ("sparsity.method=n_m", GPU, 0, "masks change the weights"),
        ("quantization.qat=int8", GPU, 0, "quantization-aware training"),
    ],
)
def test_when_blocks_are_compiled_and_why_not(
    changes: str, device: torch.device, least: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "LEAST_PARAMETERS", least)
    experiment = Experiment().set({"workload": {"name": "language"}}).replace(*changes.split())
    assert obstacle(experiment, model(), device) == expected
    if expected:
        assert Compiled(experiment, model(), device).effective() == f"none ({expected})"


def test_compiled_blocks_have_the_same_gradients(light: None) -> None:
    experiment = Experiment().set({"workload": {"name": "language"}}).replace("launch.compile=blocks")
    tokens = torch.randint(16, (4, 8))
    plain, fast = model(), model()
    assert Compiled(experiment, fast, CPU).effective() == "4 blocks"
    for one in (plain, fast):
        one(tokens).square().mean().backward()
    for (name, expected), (_, got) in zip(plain.named_parameters(), fast.named_parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, msg=name)
    assert list(plain.state_dict()) == list(fast.state_dict())


def test_hooks_see_what_runs_uncompiled(light: None) -> None:
    experiment = Experiment().set({"workload": {"name": "language"}}).replace("launch.compile=blocks")
    fast: Any = model()
    parts = Compiled(experiment, fast, CPU)
    tokens = torch.randint(16, (4, 8))
    expected = fast(tokens)
    calls: list[str] = []
    fast.blocks["layer_0"].mlp.up.register_forward_hook(lambda *of_a_hook: calls.append("up"))
    with parts.uncompiled():
        torch.testing.assert_close(fast(tokens), expected)
    assert calls == ["up"]
