"""Batches are copied on a stream of their own. Without a GPU: streams that write down what they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from labkit.training.copy_stream import CopyStream
from labkit.workloads.base import Batch

GPU = torch.device("cuda", 0)


class Stream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


def test_the_computation_waits_for_the_copy_and_its_memory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    copies, computation = Stream("copies", log), Stream("computation", log)

    @contextmanager
    def inside(stream: Stream) -> Iterator[None]:
        log.append(f"on {stream.name}")
        yield
        log.append("back")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: copies)
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computation)
    record = lambda tensor, stream: log.append(f"{len(tensor)} numbers are used on {stream.name}")  # noqa: E731
    monkeypatch.setattr(Tensor, "record_stream", record)

    def place(batch: Batch) -> Batch:
        log.append("copied")
        return {name: tensor.clone() for name, tensor in batch.items()}

    placed = CopyStream(GPU, place).place({"x": torch.arange(3), "y": torch.arange(2)})
    assert {name: tensor.tolist() for name, tensor in placed.items()} == {"x": [0, 1, 2], "y": [0, 1]}
    assert log == [
        *("on copies", "copied", "back", "computation waits for copies"),
        *("3 numbers are used on computation", "2 numbers are used on computation"),
    ]
