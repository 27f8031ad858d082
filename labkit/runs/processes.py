"""Processes by identity: a pid together with its start time, so that a recycled pid is never mistaken for the old one.

A pid is meaningful only within one boot of one machine and one pid namespace (containers on one host share the boot,
but not the pids). Both are recorded and compared first.
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
MAX_GENERATIONS = 64
"""Maximum number of parents that are followed upwards from a process."""


def _stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the state on; None if there is no such process."""
    try:
        # The command name is in brackets and may contain anything, so split after the last bracket.
        return Path(f"/proc/{pid}/stat").read_bytes().decode("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return None


def start_time(pid: int) -> float | None:
    """Return when `pid` was started, in a unit that only serves for comparison; None if there is no such process."""
    fields = _stat(pid)
    if fields is None:
        return None if sys.platform == "linux" else _portable_start_time(pid)
    return None if fields[0] in "ZX" else float(fields[19])


def frozen(pid: int) -> bool:
    """Return whether the process is stopped by a signal (SIGSTOP, SIGTSTP) and waits for SIGCONT."""
    fields = _stat(pid)
    return fields is not None and fields[0] == "T"


def children_of(pid: int) -> list[int]:
    """Return the pids of all visible descendants without zombies, parents before their children."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        fields = _stat(int(folder.name))
        if fields is not None and fields[0] not in "ZX":
            parents.setdefault(int(fields[1]), []).append(int(folder.name))
    descendants, queue = [], [pid]
    while queue:
        children = parents.get(queue.pop(0), [])
        descendants += children
        queue += children
    return descendants


def descends_from(pid: int, ancestor: int) -> bool:
    """Return whether `ancestor` is the process itself, its parent, or a parent of that, as far as /proc shows them."""
    for _ in range(MAX_GENERATIONS):
        if pid == ancestor:
            return True
        fields = _stat(pid)
        if fields is None or int(fields[1]) <= 1:
            return False
        pid = int(fields[1])
    return False


def _portable_start_time(pid: int) -> float | None:
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return None


def identity(pid: int) -> dict[str, Any]:
    """Return what is recorded about a process: pid, start time and pid namespace."""
    return {"pid": pid, "start_time": start_time(pid), "pid_namespace": pid_namespace()}


def pid_namespace() -> int:
    """Return the number of this process's pid namespace; 0 on systems without namespaces."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def visible(recorded: dict[str, Any] | None) -> bool:
    """Return whether the identity was recorded in this pid namespace; the boot is compared elsewhere."""
    return isinstance(recorded, dict) and recorded.get("pid_namespace") == pid_namespace()


def alive(recorded: dict[str, Any] | None) -> bool:
    """Return whether the recorded process is still running; a zombie is not."""
    if not isinstance(recorded, dict) or not isinstance(recorded.get("pid"), int) or recorded["pid"] <= 1:
        return False
    started = start_time(recorded["pid"])
    return started is not None and started == recorded.get("start_time")


def kill(recorded: dict[str, Any] | None, signal_number: int = signal.SIGKILL) -> bool:
    """Send a signal to the recorded process and to no other; return False if it is gone."""
    if recorded is None or not alive(recorded) or recorded.get("pid_namespace", pid_namespace()) != pid_namespace():
        return False
    try:
        os.kill(recorded["pid"], signal_number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, so that none escapes (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when `parent` dies, and exit at once if it is dead already.

    The signal exists on Linux only and is tied to the thread of the parent that forked, so ranks are forked from the
    supervisor's main thread; in addition, the rank's background thread polls `os.getppid()`.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def boot_id() -> str:
    """Return a name of this boot of this machine, so that pids from another machine are not looked up here."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        import socket

        return socket.gethostname()


def machine() -> str:
    """Return a name of this machine that survives restarts; "" if it has none."""
    import socket

    try:
        machine_id = Path("/etc/machine-id").read_text().strip()
    except OSError:
        return ""
    return f"{machine_id}:{socket.gethostname()}" if machine_id else ""
