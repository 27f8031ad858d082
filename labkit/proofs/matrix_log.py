"""What a parity matrix has found so far, in a file: one that takes an hour can be made in several sittings.

The first line says by which versions, the others hold a case each. Cases that were equal are not run again; all others
are. A file of other versions is refused: it would say of this one what was found about another.
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
    """`path`: the file, made if it is not there. ValueError if it is of other versions or no such file."""

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
        self._equal = {str(one.get("case")): one for one in map(_read, lines[1:]) if one.get("outcome") == "equal"}

    def known(self, found: Sequence[Case]) -> dict[str, Result]:
        """Results of these cases that need not be run again, by the case in words."""
        results = {}
        for case in found:
            one = self._equal.get(str(case))
            if one is not None and not case.problems:
                results[str(case)] = _result(case, one)
        return results

    def add(self, result: Result) -> None:
        """Write down what became of a case, at once."""
        line = json.dumps({"case": str(result.case)} | result.to_dict(), ensure_ascii=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _read(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}  # the last line of a process that was killed
    return found if isinstance(found, dict) else {}


def _result(case: Case, one: dict[str, Any]) -> Result:
    names = ("max_loss_difference", "max_gradient_norm_difference", "max_metric_difference")
    loss, norm, metric = (one.get(name) for name in names)
    proof = Parity(
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
    return Result(case, "equal", parity=proof, seconds=float(one.get("seconds") or 0.0))
