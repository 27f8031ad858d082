"""The results of a parity matrix in a file, so that a matrix that takes an hour can be run in several sessions.

The first line holds the versions, each other line a case. Cases that were equal are not run again; all others are. A
file of other versions is refused, because its results need not hold for these.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from labkit import __version__
from labkit.proofs.matrix import Case, Result
from labkit.proofs.parity import TOLERANCE, Parity
from labkit.runs.environment import versions


class MatrixLog:
    """The file at `path`, created if it does not exist. ValueError if it is of other versions or another kind."""

    def __init__(self, path: Path) -> None:
        self.path = path
        about = {"labkit": __version__, "torch": versions().get("torch")}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = text.splitlines()
        if text and not text.endswith("\n"):  # a process was killed while it wrote
            path.write_text(text + "\n", encoding="utf-8")
        if not lines:
            path.write_text(json.dumps(about) + "\n", encoding="utf-8")
        elif _read(lines[0]) != about:
            raise ValueError(f"{path} was not made by labkit {__version__} with torch {about['torch']}")
        entries = map(_read, lines[1:])
        self._equal = {str(entry.get("case")): entry for entry in entries if entry.get("outcome") == "equal"}

    def reusable_results(self, cases: Sequence[Case]) -> dict[str, Result]:
        """Return the results of those cases that need not be run again, by the text of the case."""
        results = {}
        for case in cases:
            entry = self._equal.get(str(case))
            if entry is not None and not case.problems:
                results[str(case)] = _result(case, entry)
        return results

    def add(self, result: Result) -> None:
        """Append the result of a case to the file at once."""
        line = json.dumps({"case": str(result.case)} | result.to_dict(), ensure_ascii=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _read(line: str) -> dict[str, Any]:
    """Return the JSON object of a line; an empty one if it is damaged."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return {}  # the last line of a process that was killed
    return entry if isinstance(entry, dict) else {}


def _result(case: Case, entry: dict[str, Any]) -> Result:
    """Return the result that an entry of the file describes."""
    names = ("max_loss_difference", "max_gradient_norm_difference", "max_metric_difference")
    loss, norm, metric = (entry.get(name) for name in names)
    parity = Parity(
        precision=case.precision,
        parity=True,
        max_loss_difference=float(loss or 0.0),
        max_gradient_norm_difference=float(norm or 0.0),
        max_metric_difference=None if metric is None else float(metric),
        tolerance=TOLERANCE[case.precision],
        steps=case.experiment.training.steps or 0,
        first_step_beyond=None,
        run_id="",
        reference_run_id="",
    )
    return Result(case, "equal", parity=parity, seconds=float(entry.get("seconds") or 0.0))
