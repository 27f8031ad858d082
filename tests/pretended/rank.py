"""Runs experiments on pretended GPUs: `python -m tests.pretended.rank` forks the ranks of each, one after another.

Reads one JSON object per line from standard input (client.py) and writes one per line, with the reports of the ranks.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any


def main() -> None:
    """Serve until standard input ends."""
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    warnings.simplefilter("ignore")
    from labkit.training.preload import preload

    preload()
    import tests.pretended.card
    import tests.pretended.groups
    import tests.pretended.steps  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Run one experiment; return the report of each rank, and what is wrong with the order of their messages."""
    from labkit.launch.board import HeartbeatTable
    from tests.pretended import order

    folder, ranks = Path(job["folder"]), int(job["ranks"])
    folder.mkdir(parents=True, exist_ok=True)
    board = HeartbeatTable(ranks)
    pids = [_fork(job, rank, folder, board) for rank in range(ranks)]
    late = _wait(pids, job["deadline_s"])
    reports = []
    for rank in range(ranks):
        file = folder / f"report-{rank}.json"
        silent = {"error": "hung" if late else "ended without a report"}
        reports.append(json.loads(file.read_text()) if file.exists() else silent)
    messages = {rank: order.read(folder / f"messages-{rank}.jsonl") for rank in range(ranks)}
    return {"ranks": reports, "order": order.faults(messages)}


def _wait(pids: list[int], deadline_s: float) -> bool:
    """Wait for all ranks; end those that take too long, and return whether there were any."""
    deadline, left, late = time.monotonic() + deadline_s, set(pids), False
    while left:
        for pid in list(left):
            if os.waitpid(pid, os.WNOHANG)[0]:
                left.discard(pid)
        if left and time.monotonic() > deadline:
            late = True
            for pid in left:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            break
        time.sleep(0.02)
    return late


def _fork(job: dict[str, Any], rank: int, folder: Path, board: Any) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        log = os.open(folder / f"log-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        _run_rank(job, rank, folder, board)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _run_rank(job: dict[str, Any], rank: int, folder: Path, board: Any) -> None:
    from labkit.experiment import Experiment
    from labkit.experiment.run_directory import RunDirectory
    from labkit.training import worker
    from labkit.training.meter import Meter
    from tests.pretended import card, planted
    from tests.pretended.findings import FINDINGS
    from tests.pretended.groups import Groups
    from tests.pretended.steps import Steps

    experiment, gpus = Experiment.from_dict(job["experiment"]), int(job["gpus"])
    groups, steps, losses = Groups(folder / f"messages-{rank}.jsonl"), Steps(), []
    steps.install()
    card.install(rank % gpus, gpus, groups)
    note = Meter.loss

    def loss(self: Any, value: Any, samples: int) -> Any:
        counted, FINDINGS.in_step = FINDINGS.in_step, False
        losses.append(float(value))
        FINDINGS.in_step = counted
        return note(self, value, samples)

    Meter.loss = loss  # type: ignore[method-assign]
    getattr(planted, job["plant"])()
    directory = RunDirectory(folder / "run")
    for path in (directory.path, *(directory.path / name for name in ("checkpoints", "events", "logs"))):
        path.mkdir(parents=True, exist_ok=True)
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ |= {"WORLD_SIZE": str(job["ranks"]), "LOCAL_WORLD_SIZE": str(job["ranks"])}
    error = ""
    try:
        worker.main(
            directory=directory,
            experiment=experiment,
            rank=rank,
            board=board,
            rendezvous=str(folder / "store"),
            requested=time.monotonic(),
        )
    except BaseException as failure:
        traceback.print_exc()
        error = f"{type(failure).__name__}: {failure}"[:600]
    report = {
        "error": error,
        "losses": losses,
        "steps": steps.counted,
        "faults": [*FINDINGS.faults, *steps.growth()],
        "waits": {text: count / max(1, steps.counted) for text, count in FINDINGS.waits.items()},
    }
    part = folder / f"report-{rank}.part"
    part.write_text(json.dumps(report))
    part.rename(folder / f"report-{rank}.json")


if __name__ == "__main__":
    main()
