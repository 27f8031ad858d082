"""The rendezvous of the ranks: a private local folder, never on a network disk, where a file store may lose updates.

Loader processes also create their sockets in it, and the path of a socket is limited (sun_path, unix(7)), so a
temporary directory with a long path is not used. The supervisor holds a lock in the folder, which is visible from other
containers too; the folder of a killed supervisor is removed by the next one.
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
MAX_PATH_LENGTH = 88
"""Maximum characters of the folder's path: with the name of a socket it stays under the 104 to 108 of unix(7)."""
_SHORT_ROOT = "/tmp"


@dataclass
class RendezvousFolder:
    """A private folder (mode 0700), locked for as long as this process lives."""

    path: Path
    lock: liveness.Lock

    def remove(self) -> None:
        """Delete the folder and release its lock."""
        safe_files.remove_folder(self.path)
        self.lock.release()


def make_folder() -> RendezvousFolder:
    """Remove the folders of supervisors that are gone, and create a new one. OSError (one sentence) if that fails."""
    root = Path(tempfile.gettempdir())
    for folder in (*root.glob(f"{_PREFIX}*"), *Path(_SHORT_ROOT).glob(f"{_PREFIX}*")):
        if _abandoned(folder):
            safe_files.remove_folder(folder)
    pid = os.getpid()
    prefix = f"{_PREFIX}{pid}-{start_time(pid) or 0:.0f}-{pid_namespace()}-"
    path_length = len(str(root)) + 1 + len(prefix) + 8
    if path_length > MAX_PATH_LENGTH:
        if not os.access(_SHORT_ROOT, os.W_OK | os.X_OK):
            raise OSError(
                f"the temporary directory {root} has too long a path for sockets; set TMPDIR to a shorter one"
            )
        root = Path(_SHORT_ROOT)
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
    # It gets its final name once it is locked, so that no process ever sees the lock file unlocked.
    lock = liveness.hold(path / ".lock")
    lock.path = lock.path.rename(path / ".alive")
    return RendezvousFolder(path, lock)


def _abandoned(folder: Path) -> bool:
    """Return whether this is a folder of this user whose supervisor no longer lives."""
    try:
        pid, started, namespace = folder.name.removeprefix(_PREFIX).split("-")[:3]
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            return False
        life = liveness.check_lock(folder / ".alive")
        if int(namespace) == pid_namespace():
            return not alive({"pid": int(pid), "start_time": float(started)}) and life is not liveness.Life.ALIVE
        return life is liveness.Life.DEAD  # of another container, whose pids have no meaning here
    except (ValueError, OSError):
        return False
