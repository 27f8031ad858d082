"""The state of a run on disk: one writer at a time, exactly one terminal state, and readers that can write it.

A supervisor that is killed cannot record its end. The next process of the run's owner on the same machine that reads
the status (a notebook, the command line) finds the lock free (labkit.runs.liveness) and writes the terminal state
instead. Other readers write nothing: what they report about a run of another machine, or about a copy of a directory,
is not on disk.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from labkit.experiment import safe_files
from labkit.experiment.run_directory import STATES, TERMINAL, RunDirectory, read_json, standby_log, write_json
from labkit.runs import liveness
from labkit.runs.leftovers import remove_unfinished
from labkit.runs.liveness import Life
from labkit.runs.logs import tail
from labkit.runs.processes import alive, boot_id, frozen, machine, visible

RESERVE_BYTES = 256 * 1024
"""Disk space set aside so that the end of the run can be recorded on a full disk."""
LOCK_WAIT_S = 10.0
"""How long to wait for another writer of the status (s)."""
FOREIGN_SILENCE_S = 600.0
"""A run of which only the files are visible counts as failed when they have not changed for this long (s)."""
UNREADABLE_SILENCE_S = 5.0
"""The same if the status cannot be read either (s)."""
NO_ANSWER_S = 5.0
"""After this long without a heartbeat, of which there are two per second, a living supervisor gets a notice (s)."""
FROZEN_S = 10.0
"""How long to wait for a process that a signal has stopped (s)."""
HUNG_S = 60.0
"""The same for a supervisor that hangs without being stopped: a busy machine may delay it for a while (s)."""
START_S = 300.0
"""The same for a launcher, which imports torch first (s)."""
HANDOVER_S = 1.5
"""How long a supervisor whose launcher has died may take to acquire its lock (s)."""
RANKS_END_S = 3.0
"""How long ranks may take to end after their supervisor (s)."""

# Types that readers rely on; a directory from elsewhere may contain anything.
_EXPECTED_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("title", "boot", "workload", "layout", "device", "resumed_from"), (str,)),
    **dict.fromkeys(("created", "started", "ended"), (int, float)),
    **dict.fromkeys(("world_size", "steps"), (int,)),
    **dict.fromkeys(("supervisor", "launcher", "cause"), (dict,)),
    **dict.fromkeys(("ranks", "warnings"), (list,)),
}


def stored(directory: RunDirectory) -> dict[str, Any] | None:
    """Return the status as written, without entries of a wrong type; None if it cannot be read."""
    status = read_json(directory.status)
    if isinstance(status, dict) and status.get("state") in STATES:
        return _with_valid_types(directory, status)
    return None


def read(directory: RunDirectory) -> dict[str, Any]:
    """Return the status as written; an unreadable one counts as failed (`reconcile` checks if the run is alive)."""
    return stored(directory) or _minimal(directory) | {
        "state": "failed",
        "cause": cause("supervisor", "the status of this run cannot be read"),
    }


def _minimal(directory: RunDirectory) -> dict[str, Any]:
    return {"run_id": directory.id, "title": directory.id}


def _with_valid_types(directory: RunDirectory, status: dict[str, Any]) -> dict[str, Any]:
    valid = {
        name: value
        for name, value in status.items()
        if value is None
        or name not in _EXPECTED_TYPES
        or (isinstance(value, _EXPECTED_TYPES[name]) and not isinstance(value, bool))
    }
    valid |= {"run_id": directory.id, "title": valid.get("title") or directory.id}
    if valid.get("cause"):
        cause_entries = cause("supervisor", "") | valid["cause"]
        log_lines = cause_entries["log"] if isinstance(cause_entries["log"], list) else []
        valid["cause"] = cause_entries | {
            "message": str(cause_entries["message"]),
            "log": [str(line) for line in log_lines],
        }
    return valid


def cause(kind: str, message: str, **more: Any) -> dict[str, Any]:
    """Return why a run did not finish: kind, one sentence, and if known rank, exception, signal and log."""
    return {"kind": kind, "message": message, "rank": None, "exception": None, "signal": None, "log": []} | more


@contextlib.contextmanager
def _locked(directory: RunDirectory) -> Iterator[None]:
    descriptor = safe_files.open_to_lock(directory.lock)
    try:
        deadline = time.monotonic() + LOCK_WAIT_S
        while True:  # bounded: the process that holds it may be frozen
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.005)
        yield
    finally:
        os.close(descriptor)


def reserve(directory: RunDirectory) -> None:
    """Set disk space aside so that the end of the run can be recorded on a full disk."""
    descriptor = safe_files.open_to_append(directory.reserve)
    try:
        os.write(descriptor, bytes(RESERVE_BYTES))
    finally:
        os.close(descriptor)
    with _locked(directory):
        pass


def update(
    directory: RunDirectory,
    *,
    fallback: dict[str, Any] | None = None,
    only_if: Callable[[], bool] = lambda: True,
    **changes: Any,
) -> dict[str, Any]:
    """Merge `changes` into the status, atomically, and return it. A terminal state is never changed.

    `fallback` is used if the status cannot be read. Nothing changes unless `only_if` returns True; it is called while
    no other process can write the status. Raises OSError if the status cannot be written.
    """
    with _locked(directory):
        status = read_json(directory.status)
        if not isinstance(status, dict) or status.get("state") not in STATES:
            status = dict(fallback) if fallback is not None else {"run_id": directory.id}
        if status.get("state") in TERMINAL or not only_if():
            return status
        status.update(changes)
        has_ended = status.get("state") in TERMINAL
        if has_ended:
            status["ended"] = time.time()
        write_even_if_full(directory, directory.status, status)
        if has_ended:
            with contextlib.suppress(OSError):
                directory.reserve.unlink()
        return status


def write_even_if_full(directory: RunDirectory, path: Path, content: dict[str, Any]) -> None:
    """Write a small JSON file of the run, on a full disk into the reserved space; raise OSError if that fails."""
    try:
        write_json(path, content)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        with contextlib.suppress(OSError):
            directory.reserve.unlink()
        write_json(path, content)


# -- readers ----------------------------------------------------------------------------------------------------------


def reconcile(directory: RunDirectory) -> dict[str, Any]:
    """Return the status as far as it is visible from here; if the supervisor is gone, the run's owner records the end.

    If the supervisor is alive but gives no heartbeat, `notice` says so, and its owner ends it after FROZEN_S or HUNG_S.
    """
    status = stored(directory)
    if status is not None and status["state"] in TERMINAL:
        return status
    life = liveness.check_lock(directory.alive)
    if life is not Life.ALIVE:
        status = stored(directory)  # the supervisor may have ended the run just before it exited
        if status is not None and status["state"] in TERMINAL:
            return status
    if status is None:
        return _reconcile_unreadable(directory, life)
    if life is Life.ALIVE:
        return _reconcile_alive(directory, status)
    if life is Life.DEAD:
        message = "the supervisor was killed from outside; its ranks died with it"
        return _end(directory, status, message, lambda: liveness.check_lock(directory.alive) is Life.DEAD)
    if life is Life.COPY:
        return _failed(status, "this directory is a copy of one whose run had not ended; nothing runs in it")
    if life is Life.RESTARTED:
        return _failed(status, "this machine was restarted during the run")
    return _reconcile_without_lock(directory, status)


def end_by_force(directory: RunDirectory) -> None:
    """End a run that did not obey a request to stop, if its processes are proved to belong to it."""
    status = stored(directory) or _minimal(directory)
    if liveness.end_holder(directory.alive):
        _end_killed(directory, status, "the supervisor did not obey the request to stop and was ended")
    elif status.get("state") == "starting" and not status.get("supervisor") and _is_own_run(directory, status):
        # Nothing needs to be killed: a supervisor that starts later finds the terminal state and exits.
        with contextlib.suppress(OSError):
            stopped = cause("stop", "stopped on request before it began")
            update(directory, only_if=partial(_has_no_supervisor, directory), state="stopped", cause=stopped)


def _has_no_supervisor(directory: RunDirectory) -> bool:
    return liveness.check_lock(directory.alive) is not Life.ALIVE


def _reconcile_unreadable(directory: RunDirectory, life: Life) -> dict[str, Any]:
    """Return the status of a run with an unreadable status file: running while its supervisor or its progress moves."""
    progresses = directory.progress.exists() and liveness.silence(directory) < UNREADABLE_SILENCE_S
    if life is Life.ALIVE or (life is Life.UNKNOWN and progresses):
        return _minimal(directory) | {"state": "running", "cause": None, "notice": "its status cannot be read"}
    return read(directory)


def _reconcile_alive(directory: RunDirectory, status: dict[str, Any]) -> dict[str, Any]:
    """Return the status of a run whose supervisor is alive; end the supervisor if it has hung for too long."""
    silence = liveness.silence(directory)
    if silence < NO_ANSWER_S:
        return status
    pid = liveness.holder(directory.alive)
    if silence > (FROZEN_S if pid is not None and frozen(pid) else HUNG_S) and liveness.end_holder(directory.alive):
        message = f"the supervisor did not answer for {silence:.0f} s and was ended; its ranks died with it"
        return _end_killed(directory, status, message)
    return status | {"notice": f"its supervisor has not answered for {silence:.0f} s"}


def _reconcile_without_lock(directory: RunDirectory, status: dict[str, Any]) -> dict[str, Any]:
    """Return the status of a run without a visible lock, judged by its recorded processes or by its files."""
    process = status.get("supervisor") or status.get("launcher")
    if status.get("boot") != boot_id() or not visible(process):
        if status.get("boot") != boot_id() and status.get("machine") == machine() != "":
            return _failed(status, "this machine was restarted during the run")
        # Its processes are not visible from here, only what it writes: progress.json twice a second.
        silence = liveness.silence(directory)
        if silence < FOREIGN_SILENCE_S:
            return status
        message = f"no sign of life for {silence / 60:.0f} min; it runs on another machine or in another container"
        return _failed(status, f"{message}, and it cannot be seen from here whether it has ended")
    assert process is not None

    def unlocked() -> bool:
        return liveness.check_lock(directory.alive) is Life.UNKNOWN

    if alive(process):
        silence, is_frozen = liveness.silence(directory), frozen(process["pid"])
        if status.get("supervisor") or silence < (FROZEN_S if is_frozen else START_S):
            return status
        reason = "is stopped by a signal" if is_frozen else "hangs"
        message = f"the launcher (process {process['pid']}) {reason} and did not begin the run within {silence:.0f} s"
        return _end(directory, status, message, unlocked)
    if status.get("supervisor"):
        return _end(directory, status, "the supervisor was killed from outside; its ranks died with it", unlocked)
    deadline = time.monotonic() + HANDOVER_S
    while time.monotonic() < deadline:
        if not unlocked() or (stored(directory) or status)["state"] != "starting":
            return reconcile(directory)
        time.sleep(0.02)
    return _end(directory, status, "the launcher died before the run began", unlocked)


def _is_own_run(directory: RunDirectory, status: dict[str, Any]) -> bool:
    """Return whether this process may record the end of the run: only its owner may, on the machine where it ran."""
    try:
        return status.get("boot") == boot_id() and directory.path.stat().st_uid == os.getuid()
    except OSError:
        return False


def _failed(status: dict[str, Any], message: str, log: list[str] | None = None) -> dict[str, Any]:
    return status | {"state": "failed", "cause": cause("supervisor", message, log=log or [])}


def _end_killed(directory: RunDirectory, status: dict[str, Any], message: str) -> dict[str, Any]:
    """Record the end of a run whose supervisor this process has just killed."""
    deadline = time.monotonic() + RANKS_END_S
    while liveness.check_lock(directory.alive) is Life.ALIVE and time.monotonic() < deadline:
        time.sleep(0.01)
    return _end(directory, status, message, lambda: liveness.check_lock(directory.alive) is Life.DEAD)


def _end(
    directory: RunDirectory, status: dict[str, Any], message: str, condition: Callable[[], bool]
) -> dict[str, Any]:
    """Record that the run failed, if this user owns it and `condition` holds; the cause quotes the end of the log."""
    had_supervisor = bool(status.get("supervisor"))
    failed_status = _failed(
        status, message, tail(directory.supervisor_log if had_supervisor else standby_log(directory.path.parent.parent))
    )
    if not _is_own_run(directory, status):
        return failed_status
    deadline = time.monotonic() + RANKS_END_S
    ranks = [rank for rank in status.get("ranks") or [] if isinstance(rank, dict) and visible(rank)]
    while any(map(alive, ranks)) and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        written = update(directory, fallback=status, only_if=condition, state="failed", cause=failed_status["cause"])
    except OSError:
        return failed_status  # a read-only directory
    if written.get("state") in TERMINAL:
        remove_unfinished(directory)
        with contextlib.suppress(OSError):
            directory.alive.unlink()
    return _with_valid_types(directory, written)
