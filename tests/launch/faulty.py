"""Tasks that go wrong, read by the workload `custom` on the ranks."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

AT_STEP = 40
GUILTY = "1"


class Network(nn.Module):
    """A linear layer that calls `fault` on the guilty rank in training step number `at` (from 1)."""

    def __init__(self, fault: Callable[[], Any], pause_s: float = 0.0, at: int = AT_STEP) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.fault, self.pause_s, self.calls, self.at = fault, pause_s, 0, at

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            time.sleep(self.pause_s)
            if self.calls == self.at and os.environ.get("RANK", GUILTY) == GUILTY:
                self.fault()
        return self.layer(x)


def _task(fault: Callable[[], Any], pause_s: float = 0.0, at: int = AT_STEP) -> dict[str, Any]:
    x = torch.randn(64, 4)
    y = (x.sum(1) > 0).long()
    network = Network(fault, pause_s, at)
    return {"model": network, "train": (x, y), "test": (x, y), "loss_fn": nn.CrossEntropyLoss(), "metric": "accuracy"}


def nothing() -> None:
    pass


def slow() -> dict[str, Any]:
    """Nothing wrong, but 20 ms a step."""
    return _task(nothing, 0.02)


def raises() -> dict[str, Any]:
    def fault() -> None:
        raise ValueError("the data of this rank is bad")

    return _task(fault)


def raises_beside_others() -> dict[str, Any]:
    """Soon, and only where there is more than one rank."""

    def fault() -> None:
        if "RANK" in os.environ:
            raise ValueError("the data of this rank is bad")

    return _task(fault, at=3)


def hangs_beside_others() -> dict[str, Any]:
    def fault() -> None:
        if "RANK" in os.environ:
            time.sleep(3600)

    return _task(fault, at=3)


def raises_a_long_story() -> dict[str, Any]:
    """A message that takes far more than a pipe holds once it is JSON."""

    def fault() -> None:
        raise ValueError("schöne Bescherung " + "ü" * 200_000)

    return _task(fault)


def exits() -> dict[str, Any]:
    """sys.exit(0) from somebody's model: a clean exit code, but no training run."""

    def fault() -> None:
        sys.exit(0)

    return _task(fault)


def hangs() -> dict[str, Any]:
    def hang_forever() -> None:
        while True:
            time.sleep(1)

    return _task(hang_forever)


def cannot_be_built() -> dict[str, Any]:
    raise RuntimeError("no such data here")


def leaves_with_exit_code_zero() -> dict[str, Any]:
    """As native code may do: the process is gone, and its exit code says that all is well."""
    return _task(lambda: os._exit(0))
