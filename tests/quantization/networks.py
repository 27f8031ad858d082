"""Small networks and experiments for the tests of this room."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from labkit.experiment import Experiment


class Small(nn.Module):
    """Two hidden layers, the second one used twice, and an output layer that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(24, 64)
        self.first = nn.Linear(64, 96)
        self.second = nn.Linear(96, 96, bias=False)
        self.again = self.second
        self.back = nn.Linear(96, 64)
        self.head = nn.Linear(64, 24, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.first(self.embedding(tokens)).tanh()
        out: Tensor = self.head(self.back(self.again(self.second(x).tanh()).tanh()))
        return out


def small(seed: int = 0) -> Small:
    torch.manual_seed(seed)
    return Small()


def tokens(count: int = 32, seed: int = 0) -> Tensor:
    return torch.randint(0, 24, (count,), generator=torch.Generator().manual_seed(seed))


def wanted(*assignments: str, **values: Any) -> Experiment:
    """The smallest language run; assignments as after --set."""
    return (
        Experiment()
        .set(
            {
                "workload": {
                    "name": "language",
                    "width": 32,
                    "depth": 2,
                    "heads": 4,
                    "context": 32,
                    "max_characters": 20_000,
                },
                "training.steps": 12,
                "training.global_batch": 16,
                "training.evaluate_every": 12,
                "training.checkpoint_every": 0,
                "optimizer.lr": 5e-3,
                "optimizer.clip_norm": 1.0,
                "launch.device": "cpu",
                "launch.max_duration_s": 120,
            }
            | values
        )
        .replace(*assignments)
    )
