"""The board: ranks agree where to stop, and a standstill is blamed on the right rank."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.experiment.run_directory import PHASES
from labkit.launch.board import HeartbeatTable


class Collective:
    """An all-reduce: nobody leaves before all have come."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=20)

    def __call__(self) -> None:
        self.barrier.wait()


def at_once(train: Callable[[int], None], ranks: int) -> None:
    """Every rank in a thread, to its end."""
    threads = [threading.Thread(target=train, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 5),
    st.integers(0, 30),
    st.lists(st.floats(0, 0.002), min_size=1, max_size=7),
)
def test_all_ranks_stop_at_the_same_step(ranks: int, requested_at: int, pauses: list[float]) -> None:
    """Each rank is a thread that dawdles where it likes; the request comes at any moment."""
    board, all_reduce, done = HeartbeatTable(ranks), Collective(ranks), [-1] * ranks

    def train(rank: int) -> None:
        step = 0
        while step < 40:
            time.sleep(pauses[(rank + step) % len(pauses)])
            if board.should_stop(rank, step):
                break
            if step == requested_at and rank == ranks - 1:
                board.request_stop()
            all_reduce()
            step += 1
        done[rank] = step

    at_once(train, ranks)
    assert len(set(done)) == 1, "a rank that went on alone would wait for ever"
    assert requested_at < done[0] <= requested_at + 3


@settings(deadline=None, max_examples=40)
@given(
    st.integers(2, 5),
    st.integers(0, 20),
    st.lists(st.floats(0, 0.002), min_size=1, max_size=7),
)
def test_stages_that_are_apart_stop_at_the_same_step(ranks: int, requested_at: int, pauses: list[float]) -> None:
    """An asynchronous pipeline: each stage waits for its neighbours only, and for nothing that will not come."""
    board, done, awaited = HeartbeatTable(ranks), [-1] * ranks, [-1] * ranks
    forth, back = ([queue.Queue[int]() for _ in range(ranks + 1)] for _ in range(2))

    def train(rank: int) -> None:
        step = begun = 0
        while step < 60 and not board.should_stop(rank, step, max_step_skew=ranks):
            until = 60 if board.stops_at is None else board.stops_at
            while begun < min(step + ranks - rank, until):
                if rank:
                    assert forth[rank].get(timeout=20) == begun
                time.sleep(pauses[(rank + begun) % len(pauses)])
                forth[rank + 1].put(begun)
                begun += 1
            awaited[rank] = max(awaited[rank], min(begun, until - 1))  # the next message is received meanwhile
            if step == requested_at and rank == ranks - 1:
                board.request_stop()
            if rank < ranks - 1:
                assert back[rank].get(timeout=20) == step
            back[rank - 1].put(step)
            step += 1
        done[rank] = step

    at_once(train, ranks)
    assert len(set(done)) == 1, "one that went on alone would wait for ever"
    assert requested_at < done[0] <= requested_at + ranks + 3
    assert max(awaited) < done[0], "nobody waits for a minibatch that is not begun any more"


def test_without_a_request_nobody_stops() -> None:
    board = HeartbeatTable(2)
    assert not any(board.should_stop(rank, step) for step in range(100) for rank in (0, 1))


@pytest.mark.parametrize("what", ["place", "stop"])
def test_nobody_reads_half_a_word(what: str) -> None:
    """One process writes as fast as it can, another reads: each value it sees was meant."""
    board = HeartbeatTable(2)
    board.progress(1, 7, 3)
    begun = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            while time.monotonic() - begun < 1.0:
                if what == "place":
                    board.progress(1, 7, 3)
                    board.heartbeat(1, 12345)
                else:
                    board._integers[1] = -1
                    board.request_stop()
                    board.should_stop(0, 10_000)
        finally:
            os._exit(0)
    wrong = reads = 0
    while time.monotonic() - begun < 1.0:
        if what == "place":
            rank_status = board.rank_status(1)
            wrong += (
                rank_status.step != 7
                or rank_status.phase != PHASES[3]
                or rank_status.progress < begun - 60
                or rank_status.heartbeat < begun - 60
            )
        else:
            wrong += board.should_stop(1, 10_000)  # the mark is 10,001 or not there
        reads += 1
    os.waitpid(pid, 0)
    assert reads > 1000
    assert wrong == 0


def at(board: HeartbeatTable, rank: int, step: int, phase: str, ago: float, life_ago: float = 0.0) -> None:
    """Put a rank where it has been for `ago` seconds."""
    board.progress(rank, step, PHASES.index(phase))
    board.heartbeat(rank, 1)
    row = board._row(rank)
    board._floats[row + 2] -= ago
    board._floats[row + 3] -= life_ago


@pytest.mark.parametrize(
    ("places", "guilty"),
    [
        ([(5, "forward", 0.1, 0), (5, "backward", 0.2, 0)], []),
        ([(5, "backward", 61, 0), (5, "forward", 61, 0)], [1]),  # one hangs, the other waits in the all-reduce
        ([(5, "backward", 61, 0), (4, "optimizer", 61, 0)], [1]),
        ([(5, "backward", 61, 0), (5, "backward", 61, 0)], [0, 1]),  # nobody knows better
        ([(5, "backward", 61, 0), (5, "forward", 10, 0)], []),  # a slow step of rank 1, which still has time
        ([(5, "backward", 61, 61), (5, "backward", 61, 0)], [0]),  # stopped: not even its thread moves
        ([(5, "backward", 61, 61), (5, "forward", 61, 0)], [0]),
        ([(5, "backward", 1, 59), (5, "backward", 1, 0)], []),
        ([(0, "setup", 61, 0), (0, "setup", 61, 0)], []),  # data and compilers take their time
        ([(0, "setup", 601, 0), (0, "forward", 601, 0)], [0]),
        ([(9, "done", 61, 0), (9, "checkpoint", 61, 0)], []),  # many gigabytes are written without another sign
        ([(9, "done", 61, 0), (9, "checkpoint", 601, 0)], [1]),
        ([(9, "evaluation", 61, 0), (9, "evaluation", 1, 0)], [0]),
    ],
)
def test_a_standstill_is_blamed_on_the_rank_that_is_behind(
    places: list[tuple[int, str, float, float]], guilty: list[int]
) -> None:
    board = HeartbeatTable(len(places))
    for rank, (step, phase, ago, life_ago) in enumerate(places):
        at(board, rank, step, phase, ago, life_ago)
    assert board.stalled_ranks(60, list(range(len(places)))) == guilty


def test_a_rank_that_has_ended_is_not_blamed() -> None:
    board = HeartbeatTable(3)
    at(board, 0, 9, "done", 100)
    at(board, 1, 3, "forward", 100)
    at(board, 2, 9, "evaluation", 100)
    assert board.stalled_ranks(60, [1, 2]) == [1]
    assert board.stalled_ranks(60, [2]) == [2]
    assert board.stalled_ranks(60, []) == []
