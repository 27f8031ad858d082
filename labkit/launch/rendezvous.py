"""The place where ranks meet: a private local folder, never a network disk, where a file store may lose updates.

Its name carries the identity of its supervisor, so that what a killed supervisor left behind is swept away by the next.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from labkit.runs.processes import alive, start_time

_PREFIX = "labkit-meet-"


def make_folder() -> Path:
    """A fresh folder (mode 0700) for this process; first, the folders of supervisors that are gone are removed."""
    root = Path(tempfile.gettempdir())
    for folder in root.glob(f"{_PREFIX}*"):
        if _abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)
    pid = os.getpid()
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{pid}-{start_time(pid)}-", dir=root))


def _abandoned(folder: Path) -> bool:
    """Is this one of our own folders whose supervisor no longer lives?"""
    try:
        pid, started = folder.name.removeprefix(_PREFIX).split("-")[:2]
        ours = not folder.is_symlink() and folder.stat().st_uid == os.getuid()
        return ours and not alive({"pid": int(pid), "start_time": float(started)})
    except (ValueError, OSError):
        return False
