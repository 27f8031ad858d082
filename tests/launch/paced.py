"""A small task whose updates take as long as LABKIT_TEST_PAUSE says (s), so that a run can be stopped in its middle."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from torch import Tensor, nn


class Paced(nn.Module):
    """Layers large enough for every compressor to have something to do, and running means."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 40), nn.ReLU())
        self.head = nn.Linear(40, 3)
        self.pause = float(os.environ.get("LABKIT_TEST_PAUSE", "0"))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.pause:
            time.sleep(self.pause)
        out: Tensor = self.head(self.layers(x))
        return out


def make_task() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(240, 8, generator=generator)
    y = (x[:, :3] + 0.3 * torch.randn(240, 3, generator=generator)).argmax(1)
    data = {"train": (x[:192], y[:192]), "test": (x[192:], y[192:])}
    return {"model": Paced(), "loss_fn": nn.CrossEntropyLoss(), "metric": "accuracy", **data}
