"""The state of a run on disk: one writer at a time, exactly one terminal state, and readers that can finish the job.

A supervisor that is killed cannot write its own end. Whoever looks next (a notebook, the command line) finds its
process gone and writes the terminal state in its place, under the same lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from labkit.experiment import safe_files
from labkit.experiment.run_directory import STATES, TERMINAL, RunDirectory, read_json, standby_log, write_json
from labkit.runs.logs import tail
from labkit.runs.processes import alive, boot_id

RESERVE_BYTES = 256 * 1024
FOREIGN_SILENCE_S = 600.0
"""A run on another machine (or from before a restart of this one) that wrote nothing for so long is given up."""

# What readers rely on; a directory from elsewhere may hold anything.
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("title", "boot", "workload", "layout", "device", "resumed_from"), (str,)),
    **dict.fromkeys(("created", "started", "ended"), (int, float)),
    **dict.fromkeys(("world_size", "steps"), (int,)),
    **dict.fromkeys(("supervisor", "launcher", "cause"), (dict,)),
    **dict.fromkeys(("ranks", "warnings"), (list,)),
}


def read(directory: RunDirectory) -> dict[str, Any]:
    """The status as written, without entries of a wrong type; a run whose status cannot be read counts as failed."""
    status = read_json(directory.status)
    if isinstance(status, dict) and status.get("state") in STATES:
        return _believable(directory, status)
    return {
        "run_id": directory.id,
        "title": directory.id,
        "state": "failed",
        "cause": cause("supervisor", "the status of this run cannot be read"),
    }


def _believable(directory: RunDirectory, status: dict[str, Any]) -> dict[str, Any]:
    kept = {
        name: value
        for name, value in status.items()
        if value is None or name not in _TYPES or (isinstance(value, _TYPES[name]) and not isinstance(value, bool))
    }
    kept |= {"run_id": directory.id, "title": kept.get("title") or directory.id}
    if kept.get("cause"):
        blamed = cause("supervisor", "") | kept["cause"]
        log = blamed["log"] if isinstance(blamed["log"], list) else []
        kept["cause"] = blamed | {"message": str(blamed["message"]), "log": [str(line) for line in log]}
    return kept


def cause(kind: str, message: str, **more: Any) -> dict[str, Any]:
    """Why a run ended other than finished: kind, one sentence, and where known rank, exception, signal, log."""
    return {"kind": kind, "message": message, "rank": None, "exception": None, "signal": None, "log": []} | more


@contextlib.contextmanager
def _locked(directory: RunDirectory) -> Iterator[None]:
    descriptor = safe_files.open_to_lock(directory.lock)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def reserve(directory: RunDirectory) -> None:
    """Set blocks aside for the last words of the run on a full disk."""
    descriptor = safe_files.open_to_append(directory.reserve)
    try:
        os.write(descriptor, bytes(RESERVE_BYTES))
    finally:
        os.close(descriptor)
    with _locked(directory):
        pass


def update(directory: RunDirectory, **changes: Any) -> dict[str, Any]:
    """Merge `changes` into the status, atomically. After a terminal state nothing changes any more."""
    with _locked(directory):
        status = read_json(directory.status)
        status = status if isinstance(status, dict) else {"run_id": directory.id}
        if status.get("state") in TERMINAL:
            return status
        status.update(changes)
        ends = status.get("state") in TERMINAL
        if ends:
            status["ended"] = time.time()
        _write_even_if_full(directory, status)
        if ends:
            with contextlib.suppress(OSError):
                directory.reserve.unlink()
        return status


def _write_even_if_full(directory: RunDirectory, status: dict[str, Any]) -> None:
    try:
        write_json(directory.status, status)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        with contextlib.suppress(OSError):
            directory.reserve.unlink()
        write_json(directory.status, status)


def reconcile(directory: RunDirectory) -> dict[str, Any]:
    """The status, after writing the terminal state of a run whose supervisor is gone."""
    status = read(directory)
    if status["state"] in TERMINAL:
        return status
    if status.get("boot") != boot_id():
        # Its processes cannot be seen from here, only what it writes: progress.json twice a second.
        silent = time.time() - max(map(_changed, (directory.status, directory.progress)))
        if silent < FOREIGN_SILENCE_S:
            return status
        said = f"no sign of life for {silent / 60:.0f} min; it ran on another machine, or this one was restarted"
        return _end(directory, status, said, tail(directory.supervisor_log))
    holder = status.get("supervisor") or status.get("launcher")
    if holder is None or alive(holder):
        return status
    status = read(directory)  # the supervisor may have ended the run just before it went
    if status["state"] in TERMINAL or (status.get("supervisor") or status.get("launcher")) != holder:
        return status
    if status.get("supervisor"):
        said = "the supervisor was killed from outside; its ranks died with it"
        return _end(directory, status, said, tail(directory.supervisor_log))
    said = "the launcher died before the run began"
    return _end(directory, status, said, tail(standby_log(directory.path.parent.parent)))


def _changed(path: Path) -> float:
    try:
        return os.lstat(path).st_mtime
    except OSError:
        return 0.0


def _end(directory: RunDirectory, status: dict[str, Any], said: str, log: list[str]) -> dict[str, Any]:
    changes = {"state": "failed", "cause": cause("supervisor", said, log=log)}
    try:
        return update(directory, **changes)
    except OSError:
        return status | changes  # a directory that may only be read
