"""The standby: a process with torch already imported that waits for orders and forks a supervisor for each.

    kernel ──pipe──▶ standby ──fork──▶ supervisor of run A ──fork──▶ rank 0, rank 1, …
                             ──fork──▶ supervisor of run B ──fork──▶ …

Importing torch and accelerate takes seconds; forking a process that has imported them takes milliseconds. Forking is
safe here and nowhere else: the standby has one thread and no CUDA context, and runs no tensor operations. It ends with
its kernel (end of file on the pipe); a supervisor runs in a session of its own and does not.

Orders are JSON lines on standard input: {"run": directory, "requested": monotonic seconds, "cwd": directory, …}.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

from labkit.experiment import safe_files
from labkit.experiment.run_directory import RunDirectory
from labkit.runs import status

# What a rank imports before its first step. Named, not imported: the client side and the ranks share only files.
ENGINE_PRELOAD = "labkit.training.preload"
WORKLOADS_PRELOAD = "labkit.workloads.preload"


def main() -> int:
    """Read orders until the kernel is gone. The environment must contain client.SINGLE_THREADED."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import_module(ENGINE_PRELOAD).preload()
    try:
        import_module(WORKLOADS_PRELOAD).preload()
    except Exception:
        # A workload whose data or package is missing must not break the runs of others: its own ranks report it.
        traceback.print_exc()
    supervise = import_module("labkit.launch.supervisor").supervise
    # All later processes share the objects that exist now; keep the collector from writing to (copying) their pages.
    gc.collect()
    gc.freeze()
    print(json.dumps({"ready": os.getpid()}), flush=True)
    pending = b""
    while True:
        ready, _, _ = select.select([0], [], [], 1.0)
        _reap()
        if not ready:
            continue
        chunk = os.read(0, 1 << 16)
        if not chunk:
            return 0
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            _execute_order(supervise, line)


def _execute_order(supervise: Any, line: bytes) -> None:
    """Fork a supervisor for one order. An order that cannot be executed fails at most its own run."""
    try:
        order = json.loads(line)
        run = RunDirectory(Path(order["run"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        print(f"labkit: not an order: {line[:200]!r}", file=sys.stderr, flush=True)
        return
    try:
        _fork_supervisor(supervise, order)
    except OSError as error:
        traceback.print_exc()
        with contextlib.suppress(Exception):  # e.g. the directory has been removed
            message = f"the launcher cannot start a process: {error.strerror or error}"
            status.update(run, state="failed", cause=status.cause("supervisor", message))


def _fork_supervisor(supervise: Any, order: dict[str, Any]) -> None:
    """Fork the supervisor, which first locks the run and records itself, and no longer depends on this process."""
    if os.fork():
        return
    code = 1
    try:
        os.setsid()
        # Neither the kernel's pipe nor its output may stay open here, because the run outlives the kernel.
        devnull = os.open(os.devnull, os.O_RDWR)
        log = safe_files.open_to_append(RunDirectory(Path(order["run"])).supervisor_log)
        for descriptor, target in ((devnull, 0), (log, 1), (log, 2)):
            os.dup2(descriptor, target)
        code = supervise(order)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _reap() -> None:
    """Reap supervisors that have ended, so that they do not stay as zombies."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


if __name__ == "__main__":
    raise SystemExit(main())
