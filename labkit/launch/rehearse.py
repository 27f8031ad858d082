"""A rehearsal before any run: the ranks build the task and try it in separate processes, and nothing is trained.

The ranks, the device and the supervisor, which names a rank that hangs, are those of a run. Only the home is a
temporary folder, and the time is bounded.
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
"""Entry of the ranks: named, not imported, like the ordinary one."""
LIMIT_S = 60.0
"""Time limit of a rehearsal (s)."""
_SETUP_FACTOR = 10
"""The set-up of a run may be silent for this many times as long as a step."""
_PHASE_DESCRIPTIONS = {
    "setup": "building the task (the function that makes it, or the data behind it)",
    "data": "fetching samples of the data set",
    "forward": "the model's forward pass",
    "backward": "the backward pass from the loss",
    "evaluation": "the held-out metric",
}


def rehearse(experiment: Experiment, limit_s: float = LIMIT_S) -> Problem | None:
    """Return why the task of a legal experiment cannot be trained, in one sentence; None if it can.

    Whatever has not answered after `limit_s` seconds is named and ended.
    """
    timeout_s = max(1.0, limit_s / _SETUP_FACTOR)
    bounded = experiment.set(
        {"launch.max_duration_s": 2 * limit_s, "launch.timeout_s": timeout_s, "launch.grace_s": 0.0}
    )
    with _temporary_home():
        run = launch(bounded, baseline=None, entry=ENTRY)
        try:
            run.wait(2 * limit_s + 30)
        except TimeoutError:
            run.stop(0)
        return None if run.state == "finished" else Problem("workload", _reason(run, limit_s))


def _reason(run: Run, limit_s: float) -> str:
    """Return in one sentence why a rehearsal did not finish."""
    cause = run.cause or {"kind": "supervisor", "message": f"no answer within {limit_s:g} s"}
    message = str(cause["message"]).rstrip(".")
    phase = re.search(r" in (\w+) of step", message)
    if cause["kind"] != "silent" or phase is None:
        return message
    seconds = limit_s if phase[1] == "setup" else limit_s / _SETUP_FACTOR
    return (
        f"rank {cause['rank']} hangs in {_PHASE_DESCRIPTIONS.get(phase[1], phase[1])}: no answer within {seconds:g} s"
    )


@contextmanager
def _temporary_home() -> Iterator[None]:
    """Use a temporary folder as the home of labkit while the context is open."""
    previous = os.environ.get("LABKIT_HOME")
    with tempfile.TemporaryDirectory(prefix="labkit-rehearsal-", ignore_cleanup_errors=True) as folder:
        os.environ["LABKIT_HOME"] = str(Path(folder) / "home")
        try:
            yield
        finally:
            if previous is None:
                del os.environ["LABKIT_HOME"]
            else:
                os.environ["LABKIT_HOME"] = previous
