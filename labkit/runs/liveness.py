"""Does a run still have its supervisor? Whoever holds the lock is alive; nothing else counts.

The supervisor holds a record lock (fcntl(2)) on `.alive` in the run directory for its life. The kernel lets go of it
when the process ends, however it ends; a fork does not inherit it; and the kernel names the holder to whoever asks,
by the pid that the holder has for the one who asks, or 0 where it has none (another container). So neither a recycled
pid, nor a clock, nor a copy of a directory can be taken for a living supervisor.

The file says to which directory it belongs (by inode number) and on which boot of which machine it was locked:
a copied directory has a lock file that belongs to another directory, and a free lock that was taken on another machine
may be one that is not seen from here.

A record lock is lost as soon as its process closes any descriptor of the file: a process never opens a lock file that
it holds itself.
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

_MOST_BYTES = 4096
_LINUX = sys.platform == "linux"
# struct flock: type, whence, start, length, pid (Linux); start, length, pid, type, whence (BSD, macOS).
_FLOCK = struct.Struct("hhqqi4x" if _LINUX else "qqihh")

_held: dict[tuple[int, int], Lock] = {}
"""Locks of this process by device and inode."""


class Life(Enum):
    """What the lock says about the supervisor of a run."""

    ALIVE = "alive"
    """The lock is held."""
    DEAD = "dead"
    """It was taken on this boot of this machine, in this very directory, and is free."""
    COPY = "copy"
    """It belongs to another directory, of which this one is a copy; nobody holds it."""
    RESTARTED = "restarted"
    """It was taken on this machine, which has been restarted since."""
    UNKNOWN = "unknown"
    """There is no lock, or it was taken on another machine and looks free from here."""


@dataclass
class Lock:
    """A held lock; `beat` shows that its holder still moves."""

    path: Path
    descriptor: int
    owner: int = field(default_factory=os.getpid)

    def beat(self) -> None:
        """Change the time of the file: that needs no free block on the disk. OSError if it cannot be."""
        now = time.time_ns()
        os.utime(self.descriptor, ns=(now, now))

    def release(self, remove: bool = False) -> None:
        """Let go; with `remove` the file goes too (after a terminal state nobody asks for it)."""
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

    BlockingIOError or PermissionError if somebody else holds it; other OSErrors where it cannot be made or locked.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        directory, holder = os.stat(path.parent).st_ino, identity(os.getpid())
        text = json.dumps({"directory": directory, "boot": boot_id(), "machine": machine(), "holder": holder}).encode()
        with suppress(OSError):  # a full disk: the lock holds all the same
            os.pwrite(descriptor, text, 0)
            os.ftruncate(descriptor, len(text))
    except BaseException:
        os.close(descriptor)
        raise
    info = os.fstat(descriptor)
    lock = _held[info.st_dev, info.st_ino] = Lock(path, descriptor)
    return lock


def look(path: Path) -> Life:
    """What the lock file at `path` says, whatever lies there; needs no right to write."""
    return _inspect(path)[0]


def end_holder(path: Path) -> bool:
    """Kill the process that holds this lock and all that it has started; True if that could be done.

    Nothing is killed unless the kernel names the process as holder of the lock in this very directory, the directory is
    this user's own, and the process still holds the lock once a handle on it has been opened.
    """
    with suppress(OSError, AttributeError):  # no process handles: an old kernel, another system
        if path.parent.stat().st_uid != os.getuid():
            return False
        life, pid, own = _inspect(path)
        if life is not Life.ALIVE or not own or pid <= 1 or pid == os.getpid():
            return False
        handle = os.pidfd_open(pid)
        try:
            if _inspect(path) != (Life.ALIVE, pid, True):
                return False
            below = [(child, os.pidfd_open(child)) for child in children_of(pid)]
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            for _, descriptor in below:
                with suppress(OSError):
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                os.close(descriptor)
            return True
        finally:
            os.close(handle)
    return False


def holder(path: Path) -> int | None:
    """Pid of the process that holds the lock in this very directory; None if none does that is seen from here."""
    life, pid, own = _inspect(path)
    return pid if life is Life.ALIVE and own and pid > 1 else None


def _inspect(path: Path) -> tuple[Life, int, bool]:
    """What the lock says, its holder (0: cannot be seen from here), and whether it belongs to this very directory."""
    try:
        info = os.stat(path, follow_symlinks=False)
        mine = _held.get((info.st_dev, info.st_ino))
        if mine is not None and mine.owner == os.getpid():
            return Life.ALIVE, os.getpid(), True
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return Life.UNKNOWN, 0, False
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return Life.UNKNOWN, 0, False
        pid = _locked_by(descriptor)
        content = _content(descriptor)
        own = content.get("directory") == os.stat(path.parent).st_ino
        if pid is not None:
            return Life.ALIVE, pid, own
        if content.get("boot") != boot_id():
            here = own and content.get("machine") == machine() != ""
            return (Life.RESTARTED if here else Life.UNKNOWN), 0, own
        return (Life.DEAD if own else Life.COPY), 0, own
    except OSError:
        return Life.UNKNOWN, 0, False
    finally:
        os.close(descriptor)


def _locked_by(descriptor: int) -> int | None:
    """Pid of the holder, 0 if it has none here, None if nobody holds the lock."""
    if _LINUX:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
    else:
        asked = _FLOCK.pack(0, 0, 0, fcntl.F_WRLCK, os.SEEK_SET)
        _, _, pid, kind, _ = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
    return None if kind == fcntl.F_UNLCK else max(0, pid)


def _content(descriptor: int) -> dict[str, Any]:
    try:
        content = json.loads(os.pread(descriptor, _MOST_BYTES, 0))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


# -- does it still move? ----------------------------------------------------------------------------------------------

GLANCE_S = 1.0
"""Of the time between two looks at most so much counts: a reader that was itself frozen has seen nothing."""
_MOST_WATCHED = 4096


@dataclass
class _Watched:
    sign: tuple[Any, ...]
    seen: float
    silence_s: float = 0.0


_watched: dict[str, _Watched] = {}


def silence(directory: RunDirectory) -> float:
    """For how many seconds this process has been looking at the run without seeing any of its files change.

    Measured by this process's own monotonic clock, from its first look on: clocks of other machines, and times of
    files, say nothing. One look alone says nothing either.
    """
    now, key = time.monotonic(), str(directory.path)
    sign = tuple(map(_changed, (directory.alive, directory.progress, directory.status)))
    watched = _watched.get(key)
    if watched is None or watched.sign != sign:
        if watched is None and len(_watched) >= _MOST_WATCHED:
            _watched.clear()
        _watched[key] = _Watched(sign, now)
        return 0.0
    watched.silence_s += min(GLANCE_S, now - watched.seen)
    watched.seen = now
    return watched.silence_s


def _changed(path: Path) -> tuple[int, int, int]:
    try:
        info = os.stat(path, follow_symlinks=False)
    except OSError:
        return (0, 0, 0)
    return (info.st_ino, info.st_mtime_ns, info.st_size)
