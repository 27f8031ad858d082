"""The outcome of a run whose ranks have all ended: its terminal state, and the rank and reason that caused it.

A fault that the supervisor detected itself comes before what ranks report. Of several ranks that failed, the first
that did so for a reason of its own is the cause; the others have merely lost their peer.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Any

from labkit.experiment.run_directory import RunDirectory
from labkit.launch.board import HeartbeatTable
from labkit.launch.child import Child
from labkit.launch.stalls import ranks_in_words
from labkit.runs import logs
from labkit.runs import status as run_status


def terminal_state(
    directory: RunDirectory,
    children: Sequence[Child],
    failure: dict[str, Any] | None,
    stop: dict[str, Any] | None,
    blocking_ranks: Sequence[int],
) -> dict[str, Any]:
    """Return the terminal changes of the status: `state`, and `cause` if it is not `finished`.

    `failure`: the fault of the supervisor's own finding, or the first failure of a rank; `stop`: why the run was being
    stopped; `blocking_ranks`: the ranks that the others were waiting for when the time to stop was over.
    """
    if stop is None:
        return {"state": "failed" if failure else "finished", "cause": failure}
    if all(child.exit_code == 0 for child in children):
        return {"state": "finished", "cause": None}  # the request came after the last step
    killed = [child.rank for child in children if child.terminated is not None]
    if failure is not None and not killed:
        return {"state": "failed", "cause": failure}  # it failed by itself while it was stopping
    if killed:
        blocking = blocking_ranks or killed
        late = f"{ranks_in_words(blocking)} did not end in time, so {ranks_in_words(killed)} had to be killed"
        stop = stop | {
            "message": f"{stop['message']}; {late}",
            "rank": blocking[0],
            "log": logs.tail(directory.log(blocking[0])),
        }
    return {"state": "stopped", "cause": stop}


def first_failure(
    directory: RunDirectory, children: Sequence[Child], heartbeats: HeartbeatTable
) -> dict[str, Any] | None:
    """Return the cause for the rank that failed first for its own reason; others merely lost their peer.

    Return None if no rank failed by itself.
    """
    failed = [child for child in children if child.failed and child.terminated is None]
    if not failed:
        return None
    child = min(failed, key=lambda child: (child.lost_peer, child.ended))
    log = logs.tail(directory.log(child.rank))
    if child.signal is not None:
        name = signal.Signals(child.signal).name
        hint = "; the machine may have run out of memory" if child.signal == signal.SIGKILL else ""
        message = f"rank {child.rank} was killed by {name}{hint}"
        return run_status.cause("signal", message, rank=child.rank, signal=name, log=log)
    report = child.report or {"type": "SystemExit", "message": f"exit code {child.exit_code}"}
    if report.get("task"):  # an error of the task: one sentence without a stack, which is in the log
        return run_status.cause("task", str(report["task"]), rank=child.rank)
    exception = f"{report['type']}: {report['message']}".removesuffix(": ")
    first_line = exception.splitlines()[0][:500]
    if child.left_early or child.report is None:
        early = heartbeats.rank_status(child.rank).phase != "done"
        qualifier = " before it was done" if early else ""
        if child.left_early and not early:
            qualifier = ", which means that it was asked to stop; nobody asked it"
        detail = f" ({first_line})" if child.report else ""
        kind, message = "exception", f"rank {child.rank} left with exit code {child.exit_code}{qualifier}{detail}"
    elif report.get("disk_full"):
        kind, message = (
            "disk",
            f"rank {child.rank} cannot write: the disk under the run directory is full ({first_line})",
        )
    else:
        kind, message = "exception", f"rank {child.rank} raised {first_line}"
    log = log or report.get("traceback", "").splitlines()[-20:]
    return run_status.cause(kind, message, rank=child.rank, exception=exception, log=log)
