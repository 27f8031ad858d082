"""Processes by identity: a pid together with its start time, so that a recycled pid is never taken for the old one."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1


def start_time(pid: int) -> float | None:
    """When `pid` was started, in a unit that only serves for comparison; None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None if sys.platform == "linux" else _portable_start_time(pid)
    # The command name is in brackets and may hold anything, so count from the last bracket on.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else float(fields[19])


def _portable_start_time(pid: int) -> float | None:
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return None


def identity(pid: int) -> dict[str, Any]:
    """What is written down about a process."""
    return {"pid": pid, "start_time": start_time(pid)}


def alive(known: dict[str, Any] | None) -> bool:
    """Is the very process that was written down still running? A zombie is not."""
    if not isinstance(known, dict) or not isinstance(known.get("pid"), int) or known["pid"] <= 1:
        return False
    started = start_time(known["pid"])
    return started is not None and started == known.get("start_time")


def kill(known: dict[str, Any] | None, number: int = signal.SIGKILL) -> bool:
    """Signal that very process and no other; False if it is gone."""
    if known is None or not alive(known):
        return False
    try:
        os.kill(known["pid"], number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


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
