"""A rehearsal before any run: the ranks build the task and try it in processes of their own, and nothing is trained.

Everything is as in a run: the same ranks, the same device, the same supervisor that names whoever hangs. Only the home
is a folder of its own that is removed afterwards, and the time is bounded.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from labkit.experiment import Experiment, Problem
from labkit.launch.client import launch
from labkit.runs.run import Run

ENTRY = "labkit.training.worker:rehearse"
"""Named, not imported, like the ordinary entry of a rank."""
LIMIT_S = 60.0
"""How long a rehearsal may take (s)."""
_SETUP_PATIENCE = 10
"""The set-up of a run may be silent so many times as long as a step."""
_PLACES = {
    "setup": "building the task (the function that makes it, or the data behind it)",
    "data": "fetching samples of the data set",
    "forward": "the model's forward pass",
    "backward": "the pass backward from the loss",
    "evaluation": "the held-out metric",
}


def rehearse(experiment: Experiment, limit_s: float = LIMIT_S) -> Problem | None:
    """Why the task of a legal experiment cannot be trained, in one sentence; None if it can.

    Bounded: what has not answered after `limit_s` seconds is named and ended.
    """
    patience = max(1.0, limit_s / _SETUP_PATIENCE)
    short = experiment.set({"launch.max_duration_s": 2 * limit_s, "launch.timeout_s": patience, "launch.grace_s": 0.0})
    with _home_of_its_own():
        run = launch(short, baseline=None, entry=ENTRY)
        try:
            run.wait(2 * limit_s + 30)
        except TimeoutError:
            run.stop(0)
        return None if run.state == "finished" else Problem("workload", _sentence(run, limit_s))


def _sentence(run: Run, limit_s: float) -> str:
    cause = run.cause or {"kind": "supervisor", "message": f"no answer within {limit_s:g} s"}
    message = str(cause["message"]).rstrip(".")
    place = re.search(r" in (\w+) of step", message)
    if cause["kind"] != "silent" or place is None:
        return message
    seconds = limit_s if place[1] == "setup" else limit_s / _SETUP_PATIENCE
    return f"rank {cause['rank']} hangs in {_PLACES.get(place[1], place[1])}: no answer within {seconds:g} s"


@contextmanager
def _home_of_its_own() -> Iterator[None]:
    before = os.environ.get("LABKIT_HOME")
    with tempfile.TemporaryDirectory(prefix="labkit-rehearsal-", ignore_cleanup_errors=True) as folder:
        os.environ["LABKIT_HOME"] = str(Path(folder) / "home")
        try:
            yield
        finally:
            if before is None:
                del os.environ["LABKIT_HOME"]
            else:
                os.environ["LABKIT_HOME"] = before
