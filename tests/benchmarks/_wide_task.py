"""Handwritten digits through wide layers: 5.3 million weights, 21 MB of gradient, for little computing.

Labels are smoothed, so that the loss falls towards about 0.5 and a gap of a few per cent means something: without it,
training ends near 0, where 2 % is nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from labkit.experiment.registry import registry
from labkit.workloads.base import TensorData

WIDTH = 2048


def make(seed: int) -> dict[str, Any]:
    workload = registry("workload")["vision"].load()
    digits = workload.build(workload.Options(image_size=16), 0)

    def flat(data: Any) -> TensorData:
        batch = data.__getitems__(list(range(len(data))))
        return TensorData(x=batch["x"].flatten(1), y=batch["y"])

    train, test = flat(digits.train), flat(digits.test)
    torch.manual_seed(seed)
    inputs = train.__getitems__([0])["x"].shape[1]
    model = nn.Sequential(
        nn.Linear(inputs, WIDTH),
        nn.LayerNorm(WIDTH),
        nn.GELU(),
        nn.Linear(WIDTH, WIDTH),
        nn.LayerNorm(WIDTH),
        nn.GELU(),
        nn.Linear(WIDTH, 256),
        nn.GELU(),
        nn.Linear(256, 10),
    )
    return {
        "model": model,
        "train": train,
        "test": test,
        "loss_fn": nn.CrossEntropyLoss(label_smoothing=0.1),
        "metric": "accuracy",
    }
