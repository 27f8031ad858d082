"""Files that were being written when the run ended: they are incomplete and will never be completed."""

from __future__ import annotations

import contextlib

from labkit.experiment.run_directory import RunDirectory


def remove_unfinished(directory: RunDirectory) -> None:
    """Remove half-written checkpoints and JSON files of a run whose processes are gone."""
    written = (directory.status, directory.progress, directory.summary, directory.environment)
    with contextlib.suppress(OSError):
        directory.remove_partial_checkpoints()
    for path in written:
        with contextlib.suppress(OSError):
            for temporary in directory.path.glob(f".{path.name}.*"):
                temporary.unlink()
