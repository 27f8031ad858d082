"""The recipe of fp8. torchao is made up: its layers need a GPU, but what they are asked for does not."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

from labkit.quantization.fp8 import Float8


@dataclass
class Config:
    enable_fsdp_float8_all_gather: bool = False
    pad_inner_dim: bool = False


def test_weights_stay_ordinary_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate's own recipe has FSDP gather weights in fp8: no checkpoint and no trace can read such weights."""
    package, layers = ModuleType("torchao"), ModuleType("torchao.float8")
    contents: Any = layers
    contents.Float8LinearConfig = Config
    monkeypatch.setitem(sys.modules, "torchao", package)
    monkeypatch.setitem(sys.modules, "torchao.float8", layers)
    monkeypatch.setattr("accelerate.utils.dataclasses.is_torchao_available", lambda: True, raising=False)
    [recipe] = Float8.handlers()
    assert recipe.config == Config(enable_fsdp_float8_all_gather=False, pad_inner_dim=True)
