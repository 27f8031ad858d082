"""Stalled ranks: which rank hangs while the others wait for it, and where it hangs.

A rank that makes no progress for longer than `launch.timeout_s` has stalled. In a collective all ranks stall together,
so each writes the stacks of its threads to its log (SIGUSR1), and the one that does not wait for others is the cause.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from typing import Any

from labkit.experiment.run_directory import RunDirectory
from labkit.launch.board import HeartbeatTable
from labkit.launch.child import Child
from labkit.launch.stacks import main_thread, waits_for_others
from labkit.runs import logs
from labkit.runs import status as run_status

STACKS_S = 2.0
"""How long ranks may take to write their stacks (s); one that is stopped or floods its log never shows them."""
STACK_LINES = 60
"""Lines of the log kept for a stalled rank: the stacks of all its threads; the last one starts with where it hangs."""


def find_stall(
    directory: RunDirectory, heartbeats: HeartbeatTable, children: Sequence[Child], timeout_s: float
) -> dict[str, Any] | None:
    """Return the cause of a run in which ranks have stalled for `timeout_s`: the rank that hangs, and its stacks.

    Return None if no rank has stalled.
    """
    running = [child for child in children if child.running]
    stalled = heartbeats.stalled_ranks(timeout_s, [child.rank for child in running])
    if not stalled:
        return None
    for child in running:
        child.send(signal.SIGUSR1)
    stacks_deadline = time.monotonic() + STACKS_S
    while True:
        time.sleep(0.1)
        stacks = {rank: logs.tail(directory.log(rank), STACK_LINES) for rank in stalled}
        if all(map(main_thread, stacks.values())) or time.monotonic() > stacks_deadline:
            break
    # Of ranks at the same step and phase (e.g. all in the set-up), one hangs and the others wait for it.
    stalled = [rank for rank in stalled if not waits_for_others(stacks[rank])] or stalled
    rank_status = heartbeats.rank_status(stalled[0])
    silence = time.monotonic() - rank_status.progress
    return run_status.cause(
        "silent",
        f"{ranks_in_words(stalled)} {'has' if len(stalled) == 1 else 'have'} been silent for {silence:.0f} s, "
        f"in {rank_status.phase} of step {rank_status.step} (launch.timeout_s is {timeout_s:g})",
        rank=stalled[0],
        log=stacks[stalled[0]],
    )


def ranks_in_words(ranks: Sequence[int]) -> str:
    """Return the ranks as words, e.g. "ranks 0 and 1"."""
    return ("rank " if len(ranks) == 1 else "ranks ") + " and ".join(map(str, ranks))
