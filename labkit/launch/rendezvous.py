"""The place where ranks meet: a private local folder, never a network disk, where a file store may lose updates.

Sockets of loader processes lie in it too, and the path of a socket is short by law (sun_path, unix(7)), so a deep
temporary directory is passed over. Its supervisor holds a lock in it, also seen from other containers; what a killed
supervisor left behind is swept away by the next.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from labkit.experiment import safe_files
from labkit.runs import liveness
from labkit.runs.processes import alive, pid_namespace, start_time

_PREFIX = "labkit-meet-"
LONGEST = 88
"""Characters of the folder's path, so that with the name of a socket it stays under the 104 to 108 of unix(7)."""
_SHORT = "/tmp"


@dataclass
class Meeting:
    """A private folder (mode 0700) for as long as this process lives."""

    path: Path
    lock: liveness.Lock

    def remove(self) -> None:
        safe_files.remove_folder(self.path)
        self.lock.release()


def make_folder() -> Meeting:
    """A fresh folder; first, those of supervisors that are gone are removed. OSError (one sentence) if it cannot be."""
    root = Path(tempfile.gettempdir())
    for folder in (*root.glob(f"{_PREFIX}*"), *Path(_SHORT).glob(f"{_PREFIX}*")):
        if _abandoned(folder):
            safe_files.remove_folder(folder)
    pid = os.getpid()
    prefix = f"{_PREFIX}{pid}-{start_time(pid) or 0:.0f}-{pid_namespace()}-"
    longest = len(str(root)) + 1 + len(prefix) + 8
    if longest > LONGEST:
        if not os.access(_SHORT, os.W_OK | os.X_OK):
            raise OSError(
                f"the temporary directory {root} has too long a path for sockets; set TMPDIR to a shorter one"
            )
        root = Path(_SHORT)
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
    # Locked before it has its name: whoever finds the lock file finds it held.
    lock = liveness.hold(path / ".lock")
    lock.path = lock.path.rename(path / ".alive")
    return Meeting(path, lock)


def _abandoned(folder: Path) -> bool:
    """Is this one of our own folders whose supervisor no longer lives?"""
    try:
        pid, started, namespace = folder.name.removeprefix(_PREFIX).split("-")[:3]
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            return False
        life = liveness.look(folder / ".alive")
        if int(namespace) == pid_namespace():
            return not alive({"pid": int(pid), "start_time": float(started)}) and life is not liveness.Life.ALIVE
        return life is liveness.Life.DEAD  # of another container, whose pids mean nothing here
    except (ValueError, OSError):
        return False
