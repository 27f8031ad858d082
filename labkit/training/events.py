"""Writer of `rank-N.jsonl`: the events of one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from labkit.experiment.event_file import EventFile


class EventWriter(EventFile):
    """Appends the events of one rank to its file. Every event gets the rank, the wall-clock and the monotonic time."""

    def __init__(self, path: Path, rank: int) -> None:
        super().__init__(path)
        self.rank = rank

    def write(self, event: str, **fields: Any) -> None:
        """Append one event; raise OSError if the disk does not take all of it (then nothing of it is kept)."""
        self.append(event, rank=self.rank, **fields)
