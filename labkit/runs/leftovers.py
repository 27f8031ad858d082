"""Files that somebody was writing when the run ended: none of them is whole, and nobody will ever complete them."""

from __future__ import annotations

import contextlib
import shutil

from labkit.experiment.run_directory import RunDirectory


def remove_unfinished(directory: RunDirectory) -> None:
    """Remove half-written checkpoints and JSON files of a run whose processes are gone."""
    written = (directory.status, directory.progress, directory.summary, directory.environment)
    checkpoints = directory.checkpoints
    with contextlib.suppress(OSError):
        for folder in () if checkpoints.is_symlink() else checkpoints.glob(".step-*.partial"):
            shutil.rmtree(folder, ignore_errors=True)
    for path in written:
        with contextlib.suppress(OSError):
            for temporary in directory.path.glob(f".{path.name}.*"):
                temporary.unlink()
