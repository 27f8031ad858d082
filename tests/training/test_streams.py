"""Waiting for a GPU is waiting for its computation. Without a GPU: a stream and a device that write down who waits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from labkit.parallel.timeline import Timeline
from labkit.training.clock import finish

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Messages that an asynchronous pipeline has posted ahead end only when other ranks get further."""
    calls: list[str] = []
    stream = SimpleNamespace(synchronize=lambda: calls.append("stream"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *device: stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: pytest.fail("waits for messages posted ahead"))
    return calls


def test_the_end_of_a_step_waits_for_the_stream_of_the_computation(waits: list[str]) -> None:
    finish(CPU)
    assert waits == []
    finish(GPU)
    assert waits == ["stream"]


def test_so_does_the_timeline_of_a_pipeline(waits: list[str]) -> None:
    timeline = Timeline(GPU, 2)
    timeline.start()
    assert timeline.timed("F", 0, 0, lambda: 5) == 5
    assert waits == ["stream", "stream"]
    assert [action[:3] for action in timeline.stop()] == [("F", 0, 0)]
