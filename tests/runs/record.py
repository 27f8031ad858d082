"""Run directories made up for tests, as ranks and supervisor would have written them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from labkit.experiment import Experiment
from labkit.experiment.run_directory import RunDirectory, write_json


def record(
    home: Path,
    name: str,
    seconds: Sequence[float] | None = None,
    changes: str = "",
    created: float = 1000.0,
    **status: Any,
) -> RunDirectory:
    """A run with these step times on every rank; `changes` as after --set, separated by spaces."""
    experiment = Experiment().replace("launch.device=cpu", *changes.split())
    directory = RunDirectory(home / "runs" / name)
    directory.path.mkdir(parents=True)
    ranks = experiment.layout.world_size
    write_json(directory.experiment, experiment.to_dict())
    write_json(directory.environment, {"host": "here"})
    base = {"state": "finished", "title": name, "created": created, "world_size": ranks, "steps": len(seconds or [])}
    write_json(directory.status, base | status)
    order = created * 10**9
    os.utime(directory.experiment, ns=(int(order), int(order)))
    for rank in range(ranks if seconds is not None else 0):
        metric = {"key": "accuracy", "title": "Held-out accuracy", "higher_is_better": True, "unit": "%"}
        lines: list[dict[str, Any]] = [{"event": "start", "first": 0, "metric": metric}]
        count = len(seconds or [])
        columns = {"loss": [1.0] * count, "samples": [64 // ranks] * count, "seconds": list(seconds or [])}
        lines.append({"event": "steps", "first": 0} | columns)
        if rank == 0:
            lines.append({"event": "evaluation", "step": count, "metrics": {"loss": 0.5, "accuracy": 0.9}})
        head = {"rank": rank, "time": 1.0, "monotonic": 1.0}
        directory.events(rank).write_text("".join(json.dumps(head | line) + "\n" for line in lines))
    return directory
