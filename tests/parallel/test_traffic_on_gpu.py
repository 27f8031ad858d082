"""What counts as exposed where a GPU has several streams, with streams and a clock that are made up. On the CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from labkit.experiment import Layout
from labkit.parallel.traffic import Traffic


class Stream:
    """A stream that waits as long as it is told."""

    def __init__(self, clock: GpuClock) -> None:
        self.clock = clock

    def wait_event(self, seconds: float) -> None:
        """Wait for something that takes so long."""
        if self is self.clock.current:
            self.clock.time += seconds


class GpuClock:
    """A clock of the current stream."""

    def __init__(self) -> None:
        self.time = 0.0
        self.main, self.beside = Stream(self), Stream(self)
        self.current = self.main

    def now(self) -> float:
        return self.time

    def stream(self) -> Stream:
        return self.current

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


def counted(monkeypatch: Any, clock: GpuClock, step: Any) -> dict[str, Any]:
    """The counts of a step in which `step(send)` sends by calling `send(seconds)`."""

    class ProcessGroup:
        def allreduce(self, seconds: float) -> None:
            clock.time += seconds

        def size(self) -> int:
            return 2

    monkeypatch.setattr(dist, "ProcessGroup", ProcessGroup)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [0, 1])
    monkeypatch.setattr("labkit.parallel.traffic._size", lambda tensors: 8)
    mesh: Any = SimpleNamespace(layout=Layout(dp_shard=2), rank=0)
    group = ProcessGroup()
    with Traffic(mesh, clock) as traffic:
        step(lambda seconds: group.allreduce(seconds))
    [(axis, counts)] = traffic.axes().items()
    assert axis == "dp_shard"
    assert counts["bytes"] == 8
    return dict(counts)


def test_what_the_loop_sends_on_its_own_stream_is_exposed(monkeypatch: Any) -> None:
    clock = GpuClock()
    assert counted(monkeypatch, clock, lambda send: send(0.25))["exposed_seconds"] == 0.25


def test_what_another_stream_sends_is_hidden_until_the_loop_waits_for_it(monkeypatch: Any) -> None:
    clock = GpuClock()

    def step(send: Any) -> None:
        clock.current = clock.beside
        send(4.0)
        clock.beside.wait_event(1.0)
        clock.current = clock.main
        clock.time += 3.0  # computing
        clock.main.wait_event(0.5)

    assert counted(monkeypatch, clock, step)["exposed_seconds"] == 0.5
    assert Stream.__dict__["wait_event"].__name__ == "wait_event", "put back"


def test_waits_for_what_sends_nothing_are_not_exposed(monkeypatch: Any) -> None:
    clock = GpuClock()

    def step(send: Any) -> None:
        clock.main.wait_event(2.0)  # a copy to the host, say
        send(0.25)

    assert counted(monkeypatch, clock, step)["exposed_seconds"] == 0.25
