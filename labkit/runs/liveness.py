"""Whether the supervisor of a run is alive: it is if it holds the lock of the run; nothing else counts.

The supervisor holds a record lock (fcntl(2)) on `.alive` in the run directory as long as it lives. The kernel releases
the lock when the process ends, however it ends; a forked process does not inherit it; and the kernel gives the pid of
the holder, as seen from the asking process, or 0 if it has none there (another container). So neither a recycled pid,
nor a clock, nor a copy of a directory can be taken for a living supervisor.

The file records to which directory it belongs (by inode number) and on which boot of which machine it was locked:
a copied directory has a lock file that belongs to another directory, and a lock that was taken on another machine may
look free from here although it is held.

A record lock is lost as soon as its process closes any descriptor of the file, so a process never opens a lock file
whose lock it holds.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat
import struct
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from labkit.experiment.run_directory import RunDirectory
from labkit.runs.processes import boot_id, children_of, identity, machine

_MAX_BYTES = 4096
_LINUX = sys.platform == "linux"
# struct flock: type, whence, start, length, pid (Linux); start, length, pid, type, whence (BSD, macOS).
_FLOCK = struct.Struct("hhqqi4x" if _LINUX else "qqihh")

_held: dict[tuple[int, int], Lock] = {}
"""Locks of this process by device and inode."""


class Life(Enum):
    """State of the supervisor of a run, according to the lock."""

    ALIVE = "alive"
    """The lock is held."""
    DEAD = "dead"
    """The lock was taken after the last boot of this machine, in this very directory, and is free."""
    COPY = "copy"
    """The lock belongs to another directory, of which this one is a copy; no process holds it."""
    RESTARTED = "restarted"
    """The lock was taken on this machine, which has been restarted since."""
    UNKNOWN = "unknown"
    """There is no lock, or it was taken on another machine and looks free from here."""


@dataclass
class Lock:
    """A held lock; `beat` is the heartbeat of its holder."""

    path: Path
    descriptor: int
    owner: int = field(default_factory=os.getpid)

    def beat(self) -> None:
        """Touch the file, which needs no free block on the disk; raise OSError if that fails."""
        now = time.time_ns()
        os.utime(self.descriptor, ns=(now, now))

    def release(self, remove: bool = False) -> None:
        """Release the lock; with `remove`, delete the file too (it is not needed after a terminal state)."""
        if remove:
            with suppress(OSError):
                self.path.unlink()
        for key, lock in list(_held.items()):
            if lock is self:
                del _held[key]
        with suppress(OSError):
            os.close(self.descriptor)


def hold(path: Path) -> Lock:
    """Lock this file, in the directory of the run or another private one, for as long as this process lives.

    Raises BlockingIOError or PermissionError if another process holds the lock, and other OSErrors if the file cannot
    be created or locked.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        directory, holder = os.stat(path.parent).st_ino, identity(os.getpid())
        text = json.dumps({"directory": directory, "boot": boot_id(), "machine": machine(), "holder": holder}).encode()
        with suppress(OSError):  # on a full disk the lock still holds
            os.pwrite(descriptor, text, 0)
            os.ftruncate(descriptor, len(text))
    except BaseException:
        os.close(descriptor)
        raise
    info = os.fstat(descriptor)
    lock = _held[info.st_dev, info.st_ino] = Lock(path, descriptor)
    return lock


def check_lock(path: Path) -> Life:
    """Return the state of the supervisor from the lock file at `path`, which may be anything; needs no write access."""
    return _inspect(path)[0]


def end_holder(path: Path) -> bool:
    """Kill the process that holds this lock and all of its descendants; return whether that was possible.

    Nothing is killed unless the kernel names the process as the holder of the lock in this very directory, this user
    owns the directory, and the process still holds the lock after a handle on it has been opened.
    """
    with suppress(OSError, AttributeError):  # no process handles on an old kernel or another system
        if path.parent.stat().st_uid != os.getuid():
            return False
        life, pid, belongs_here = _inspect(path)
        if life is not Life.ALIVE or not belongs_here or pid <= 1 or pid == os.getpid():
            return False
        handle = os.pidfd_open(pid)
        try:
            if _inspect(path) != (Life.ALIVE, pid, True):
                return False
            descendants = [(child, os.pidfd_open(child)) for child in children_of(pid)]
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            for _, descriptor in descendants:
                with suppress(OSError):
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                os.close(descriptor)
            return True
        finally:
            os.close(handle)
    return False


def holder(path: Path) -> int | None:
    """Return the pid of the process that holds the lock in this very directory; None if none is visible from here."""
    life, pid, belongs_here = _inspect(path)
    return pid if life is Life.ALIVE and belongs_here and pid > 1 else None


def _inspect(path: Path) -> tuple[Life, int, bool]:
    """Return the state of the lock, its holder (0: not visible from here) and whether it belongs to this directory."""
    try:
        info = os.stat(path, follow_symlinks=False)
        own_lock = _held.get((info.st_dev, info.st_ino))
        if own_lock is not None and own_lock.owner == os.getpid():
            return Life.ALIVE, os.getpid(), True
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return Life.UNKNOWN, 0, False
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return Life.UNKNOWN, 0, False
        pid = _locked_by(descriptor)
        content = _content(descriptor)
        belongs_here = content.get("directory") == os.stat(path.parent).st_ino
        if pid is not None:
            return Life.ALIVE, pid, belongs_here
        if content.get("boot") != boot_id():
            same_machine = belongs_here and content.get("machine") == machine() != ""
            return (Life.RESTARTED if same_machine else Life.UNKNOWN), 0, belongs_here
        return (Life.DEAD if belongs_here else Life.COPY), 0, belongs_here
    except OSError:
        return Life.UNKNOWN, 0, False
    finally:
        os.close(descriptor)


def _locked_by(descriptor: int) -> int | None:
    """Return the pid of the holder, 0 if it has none here, None if no process holds the lock."""
    if _LINUX:
        request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, request))
    else:
        request = _FLOCK.pack(0, 0, 0, fcntl.F_WRLCK, os.SEEK_SET)
        _, _, pid, kind, _ = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, request))
    return None if kind == fcntl.F_UNLCK else max(0, pid)


def _content(descriptor: int) -> dict[str, Any]:
    try:
        content = json.loads(os.pread(descriptor, _MAX_BYTES, 0))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


# -- signs of life ----------------------------------------------------------------------------------------------------

MAX_COUNTED_S = 1.0
"""At most this much of the time between two checks counts (s): a reader may itself have been frozen."""
_MAX_WATCHED = 4096


@dataclass
class _Observation:
    stamps: tuple[Any, ...]
    last_check: float
    silence_s: float = 0.0


_observations: dict[str, _Observation] = {}


def silence(directory: RunDirectory) -> float:
    """Return for how many seconds this process has checked the run without seeing any of its files change.

    Measured by the monotonic clock of this process, from its first check: neither clocks of other machines nor times of
    files are trusted. The first check returns 0.
    """
    now, key = time.monotonic(), str(directory.path)
    stamps = tuple(map(_file_stamp, (directory.alive, directory.progress, directory.status)))
    observation = _observations.get(key)
    if observation is None or observation.stamps != stamps:
        if observation is None and len(_observations) >= _MAX_WATCHED:
            _observations.clear()
        _observations[key] = _Observation(stamps, now)
        return 0.0
    observation.silence_s += min(MAX_COUNTED_S, now - observation.last_check)
    observation.last_check = now
    return observation.silence_s


def _file_stamp(path: Path) -> tuple[int, int, int]:
    try:
        info = os.stat(path, follow_symlinks=False)
    except OSError:
        return (0, 0, 0)
    return (info.st_ino, info.st_mtime_ns, info.st_size)
