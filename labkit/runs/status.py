"""The state of a run on disk: one writer at a time, exactly one terminal state, and readers that can finish the job.

A supervisor that is killed cannot write its own end. The owner of the run who looks next on the same machine (a
notebook, the command line) finds its lock free (labkit.runs.liveness) and writes the terminal state in its place.
Everybody else judges and writes nothing: what is reported about a run of another machine, or about a copy of a
directory, is not on disk.
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
LOCK_WAIT_S = 10.0
"""How long to wait for another writer of the status."""
FOREIGN_SILENCE_S = 600.0
"""A run of which nothing but its files can be seen is given up when these did not change for so long."""
UNREADABLE_SILENCE_S = 5.0
"""The same where the status cannot be read either."""
NO_ANSWER_S = 5.0
"""A living supervisor that shows no sign for so long is said not to answer: it shows one twice a second."""
FROZEN_S = 10.0
"""A process that a signal has stopped is not waited for any longer than this."""
DEAF_S = 60.0
"""The same for a supervisor that is not stopped but hangs: a busy machine may hold it up for a while."""
START_S = 300.0
"""The same for a launcher, which imports torch first."""
HANDOVER_S = 0.3
"""A supervisor whose launcher has died gets so long to take its lock."""
GONE_S = 3.0
"""How long ranks may take to end after their supervisor."""

# What readers rely on; a directory from elsewhere may hold anything.
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("title", "boot", "workload", "layout", "device", "resumed_from"), (str,)),
    **dict.fromkeys(("created", "started", "ended"), (int, float)),
    **dict.fromkeys(("world_size", "steps"), (int,)),
    **dict.fromkeys(("supervisor", "launcher", "cause"), (dict,)),
    **dict.fromkeys(("ranks", "warnings"), (list,)),
}


def stored(directory: RunDirectory) -> dict[str, Any] | None:
    """The status as written, without entries of a wrong type; None if it cannot be read."""
    status = read_json(directory.status)
    if isinstance(status, dict) and status.get("state") in STATES:
        return _believable(directory, status)
    return None


def read(directory: RunDirectory) -> dict[str, Any]:
    """The status as written; a run whose status cannot be read counts as failed (`reconcile` asks whether it lives)."""
    return stored(directory) or _nameless(directory) | {
        "state": "failed",
        "cause": cause("supervisor", "the status of this run cannot be read"),
    }


def _nameless(directory: RunDirectory) -> dict[str, Any]:
    return {"run_id": directory.id, "title": directory.id}


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
        deadline = time.monotonic() + LOCK_WAIT_S
        while True:  # bounded: whoever holds it may have been frozen
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
    """Set blocks aside for the last words of the run on a full disk."""
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
    known: dict[str, Any] | None = None,
    only_if: Callable[[], bool] = lambda: True,
    **changes: Any,
) -> dict[str, Any]:
    """Merge `changes` into the status, atomically, and return it. After a terminal state nothing changes any more.

    `known` takes the place of a status that cannot be read. Nothing changes either unless `only_if` holds, asked when
    no other writer can come between. OSError if it cannot be written.
    """
    with _locked(directory):
        status = read_json(directory.status)
        if not isinstance(status, dict) or status.get("state") not in STATES:
            status = dict(known) if known is not None else {"run_id": directory.id}
        if status.get("state") in TERMINAL or not only_if():
            return status
        status.update(changes)
        ends = status.get("state") in TERMINAL
        if ends:
            status["ended"] = time.time()
        write_even_if_full(directory, directory.status, status)
        if ends:
            with contextlib.suppress(OSError):
                directory.reserve.unlink()
        return status


def write_even_if_full(directory: RunDirectory, path: Path, content: dict[str, Any]) -> None:
    """Write a small JSON file of the run, on a full disk into the blocks set aside. OSError if it cannot be."""
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
    """The status as far as it can be told from here; the owner of a run whose supervisor is gone writes its end.

    Where the supervisor lives but does not move, `notice` says so, and its owner ends it after FROZEN_S or DEAF_S.
    """
    status = stored(directory)
    if status is not None and status["state"] in TERMINAL:
        return status
    life = liveness.look(directory.alive)
    if life is not Life.ALIVE:
        status = stored(directory)  # the supervisor may have ended the run just before it went
        if status is not None and status["state"] in TERMINAL:
            return status
    if status is None:
        return _judge_unreadable(directory, life)
    if life is Life.ALIVE:
        return _judge_answer(directory, status)
    if life is Life.DEAD:
        said = "the supervisor was killed from outside; its ranks died with it"
        return _end(directory, status, said, lambda: liveness.look(directory.alive) is Life.DEAD)
    if life is Life.COPY:
        return _failed(status, "this directory is a copy of one whose run had not ended; nothing runs in it")
    if life is Life.RESTARTED:
        return _failed(status, "this machine was restarted while the run went on")
    return _judge_without_lock(directory, status)


def end_by_force(directory: RunDirectory) -> None:
    """End a run that did not obey a request to stop, if it can be proved that what is ended belongs to it."""
    status = stored(directory) or _nameless(directory)
    if liveness.end_holder(directory.alive):
        _end_killed(directory, status, "the supervisor did not obey the request to stop and was ended")
    elif status.get("state") == "starting" and not status.get("supervisor") and _mine(directory, status):
        # Nothing needs to be killed: a supervisor that begins later finds the end written and leaves.
        with contextlib.suppress(OSError):
            stopped = cause("stop", "stopped on request before it began")
            update(directory, only_if=partial(_has_no_supervisor, directory), state="stopped", cause=stopped)


def _has_no_supervisor(directory: RunDirectory) -> bool:
    return liveness.look(directory.alive) is not Life.ALIVE


def _judge_unreadable(directory: RunDirectory, life: Life) -> dict[str, Any]:
    """A run goes on while its supervisor lives, or its progress is written, whatever has become of its status."""
    moves = directory.progress.exists() and liveness.silence(directory) < UNREADABLE_SILENCE_S
    if life is Life.ALIVE or (life is Life.UNKNOWN and moves):
        return _nameless(directory) | {"state": "running", "cause": None, "notice": "its status cannot be read"}
    return read(directory)


def _judge_answer(directory: RunDirectory, status: dict[str, Any]) -> dict[str, Any]:
    """A run whose supervisor lives: does it still move?"""
    quiet = liveness.silence(directory)
    if quiet < NO_ANSWER_S:
        return status
    pid = liveness.holder(directory.alive)
    if quiet > (FROZEN_S if pid is not None and frozen(pid) else DEAF_S) and liveness.end_holder(directory.alive):
        said = f"the supervisor did not answer for {quiet:.0f} s and was ended; its ranks died with it"
        return _end_killed(directory, status, said)
    return status | {"notice": f"its supervisor does not answer for {quiet:.0f} s"}


def _judge_without_lock(directory: RunDirectory, status: dict[str, Any]) -> dict[str, Any]:
    """A run that has not begun, or whose lock is not seen: judged by the processes written down, or by its files."""
    process = status.get("supervisor") or status.get("launcher")
    if status.get("boot") != boot_id() or not visible(process):
        if status.get("boot") != boot_id() and status.get("machine") == machine() != "":
            return _failed(status, "this machine was restarted while the run went on")
        # Its processes cannot be seen from here, only what it writes: progress.json twice a second.
        quiet = liveness.silence(directory)
        if quiet < FOREIGN_SILENCE_S:
            return status
        said = f"no sign of life for {quiet / 60:.0f} min; it runs on another machine or in another container"
        return _failed(status, f"{said}, and nobody can tell from here whether it has ended")
    assert process is not None

    def unlocked() -> bool:
        return liveness.look(directory.alive) is Life.UNKNOWN

    if alive(process):
        quiet, stopped = liveness.silence(directory), frozen(process["pid"])
        if status.get("supervisor") or quiet < (FROZEN_S if stopped else START_S):
            return status
        why = "is stopped by a signal" if stopped else "hangs"
        said = f"the launcher (process {process['pid']}) {why} and did not begin the run within {quiet:.0f} s"
        return _end(directory, status, said, unlocked)
    if status.get("supervisor"):
        return _end(directory, status, "the supervisor was killed from outside; its ranks died with it", unlocked)
    deadline = time.monotonic() + HANDOVER_S
    while time.monotonic() < deadline:
        if not unlocked() or (stored(directory) or status)["state"] != "starting":
            return reconcile(directory)
        time.sleep(0.02)
    return _end(directory, status, "the launcher died before the run began", unlocked)


def _mine(directory: RunDirectory, status: dict[str, Any]) -> bool:
    """May this process write the end of the run? Only its owner may, on the machine where it ran."""
    try:
        return status.get("boot") == boot_id() and directory.path.stat().st_uid == os.getuid()
    except OSError:
        return False


def _failed(status: dict[str, Any], said: str, log: list[str] | None = None) -> dict[str, Any]:
    return status | {"state": "failed", "cause": cause("supervisor", said, log=log or [])}


def _end_killed(directory: RunDirectory, status: dict[str, Any], said: str) -> dict[str, Any]:
    """The end of a run whose supervisor has just been killed from here."""
    deadline = time.monotonic() + GONE_S
    while liveness.look(directory.alive) is Life.ALIVE and time.monotonic() < deadline:
        time.sleep(0.01)
    return _end(directory, status, said, lambda: liveness.look(directory.alive) is Life.DEAD)


def _end(directory: RunDirectory, status: dict[str, Any], said: str, still: Callable[[], bool]) -> dict[str, Any]:
    """Write that the run failed, if it is this user's own and `still` holds; the cause quotes the end of the log."""
    begun = bool(status.get("supervisor"))
    ended = _failed(
        status, said, tail(directory.supervisor_log if begun else standby_log(directory.path.parent.parent))
    )
    if not _mine(directory, status):
        return ended
    deadline = time.monotonic() + GONE_S
    ranks = [rank for rank in status.get("ranks") or [] if isinstance(rank, dict) and visible(rank)]
    while any(map(alive, ranks)) and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        written = update(directory, known=status, only_if=still, state="failed", cause=ended["cause"])
    except OSError:
        return ended  # a directory that may only be read
    if written.get("state") in TERMINAL:
        remove_unfinished(directory)
        with contextlib.suppress(OSError):
            directory.alive.unlink()
    return _believable(directory, written)
