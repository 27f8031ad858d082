"""Processes by identity: a pid together with its start time, so that a recycled pid is never taken for the old one.

A pid means something only among processes that count alike: the same boot of the same machine, and the same pid
namespace (containers on one host share the boot, not the pids). Both are written down and compared first.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on; None if there is no such process."""
    try:
        # The command name is in brackets and may hold anything, so count from the last bracket on.
        return Path(f"/proc/{pid}/stat").read_bytes().decode("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return None


def start_time(pid: int) -> float | None:
    """When `pid` was started, in a unit that only serves for comparison; None if there is no such process."""
    fields = _stat(pid)
    if fields is None:
        return None if sys.platform == "linux" else _portable_start_time(pid)
    return None if fields[0] in "ZX" else float(fields[19])


def frozen(pid: int) -> bool:
    """Is this process stopped by a signal (SIGSTOP, SIGTSTP), so that it does nothing until somebody continues it?"""
    fields = _stat(pid)
    return fields is not None and fields[0] == "T"


def children_of(pid: int) -> list[int]:
    """Pids of all descendants that can be seen now, zombies left out; parents come before their children."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        fields = _stat(int(folder.name))
        if fields is not None and fields[0] not in "ZX":
            parents.setdefault(int(fields[1]), []).append(int(folder.name))
    descendants, queue = [], [pid]
    while queue:
        below = parents.get(queue.pop(0), [])
        descendants += below
        queue += below
    return descendants


def _portable_start_time(pid: int) -> float | None:
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return None


def identity(pid: int) -> dict[str, Any]:
    """What is written down about a process."""
    return {"pid": pid, "start_time": start_time(pid), "pid_namespace": pid_namespace()}


def pid_namespace() -> int:
    """Number of the namespace in which this process counts pids; 0 where there are none."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def visible(known: dict[str, Any] | None) -> bool:
    """Was this identity written down where pids mean what they mean here? (The boot is compared elsewhere.)"""
    return isinstance(known, dict) and known.get("pid_namespace") == pid_namespace()


def alive(known: dict[str, Any] | None) -> bool:
    """Is the very process that was written down still running? A zombie is not."""
    if not isinstance(known, dict) or not isinstance(known.get("pid"), int) or known["pid"] <= 1:
        return False
    started = start_time(known["pid"])
    return started is not None and started == known.get("start_time")


def kill(known: dict[str, Any] | None, number: int = signal.SIGKILL) -> bool:
    """Signal that very process and no other; False if it is gone."""
    if known is None or not alive(known) or known.get("pid_namespace", pid_namespace()) != pid_namespace():
        return False
    try:
        os.kill(known["pid"], number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, so that none can escape (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when `parent` dies, and go at once if it is dead already.

    Linux only and tied to the parent's thread that forked, so ranks are forked from the supervisor's main thread; the
    rank's background thread polls `os.getppid()` besides.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def boot_id() -> str:
    """Names this boot of this machine, so that pids from another machine are not looked up here."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        import socket

        return socket.gethostname()


def machine() -> str:
    """Names this machine across restarts, as far as that can be told; "" where it cannot."""
    import socket

    try:
        number = Path("/etc/machine-id").read_text().strip()
    except OSError:
        return ""
    return f"{number}:{socket.gethostname()}" if number else ""
