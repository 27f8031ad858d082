"""The handle of a run, with the interface of a Future. All of its state is in the run directory.

So a restarted kernel, a second notebook and the command line can all attach to the same run.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from labkit.experiment import Experiment, ExperimentError
from labkit.experiment.run_directory import TERMINAL, RunDirectory, read_json
from labkit.runs import logs
from labkit.runs import status as run_status
from labkit.runs.data import RunData
from labkit.runs.liveness import Life, check_lock

if TYPE_CHECKING:
    import pandas as pd

    from labkit.runs.profile import RunProfile

POLL_S = 0.05
OVERTIME_S = 10.0
"""Seconds after the grace period that a supervisor has to end its ranks before it is killed itself."""


class RunFailed(RuntimeError):
    """Raised if the run failed; the message is the cause, and `kind` is the kind of the cause."""

    def __init__(self, message: str, kind: str | None = None) -> None:
        super().__init__(message)
        self.kind = kind


class Run:
    """A run that is in progress or has ended.

    `state` is one of starting, running, stopping, finished, stopped, failed.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory

    @classmethod
    def attach(cls, reference: str | os.PathLike[str] = "last") -> Run:
        """Return the run with this id, at this path, or the `last` one; raise FileNotFoundError if there is none."""
        return cls(RunDirectory.find(reference))

    @classmethod
    def all(cls) -> list[Run]:
        """Return all runs under LABKIT_HOME, oldest first."""
        return [cls(directory) for directory in RunDirectory.all()]

    @property
    def id(self) -> str:
        return self.directory.id

    @property
    def title(self) -> str:
        """Title of the run; free text that must be escaped in HTML."""
        return str(run_status.read(self.directory).get("title") or self.id)

    @property
    def experiment(self) -> Experiment:
        """The experiment, with device and layout resolved."""
        return Experiment.of_run(self.directory)

    @property
    def status(self) -> dict[str, Any]:
        """Status as far as it is visible from here; if the supervisor is gone, the owner of the run records its end."""
        return run_status.reconcile(self.directory)

    @property
    def state(self) -> str:
        """State of the run: starting, running, stopping, finished, stopped or failed."""
        return str(self.status["state"])

    @property
    def done(self) -> bool:
        """Whether the run has ended."""
        return self.state in TERMINAL

    @property
    def cause(self) -> dict[str, Any] | None:
        """Why the run was stopped or failed: kind, message, rank, exception, signal, log."""
        return self.status.get("cause")

    def wait(self, timeout: float | None = None) -> Run:
        """Wait until the run has ended; raise TimeoutError after `timeout` seconds (the run continues)."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.done:
            if deadline is not None and time.monotonic() > deadline:
                status = self.status
                remark = status.get("notice") or "it continues"
                raise TimeoutError(f"run {self.id} is still {status['state']} after {timeout:g} s; {remark}")
            time.sleep(POLL_S)
        return self

    def result(self, timeout: float | None = None) -> dict[str, Any]:
        """Wait and return the summary; raise RunFailed with the cause if the run failed."""
        if self.wait(timeout).state == "failed":
            cause = self.cause or {}
            raise RunFailed(cause.get("message", "failed"), cause.get("kind"))
        return self.summary()

    def request_stop(self, grace: float | None = None) -> None:
        """Ask the run to finish its step, write a checkpoint and end; return at once.

        After `grace` seconds (None: launch.grace_s) the ranks are killed.
        """
        status = run_status.stored(self.directory)
        if status is None or status["state"] not in TERMINAL or check_lock(self.directory.alive) is Life.ALIVE:
            request = {"requested": time.time(), "grace_s": grace}
            run_status.write_even_if_full(self.directory, self.directory.stop, request)

    def stop(self, grace: float | None = None) -> Run:
        """Ask the run to stop and wait for its end; kill a supervisor that does not obey in time.

        Raises TimeoutError if the run has not ended even then and cannot be ended from here.
        """
        self.request_stop(grace)
        limit = (self._grace_s() if grace is None else grace) + OVERTIME_S
        try:
            return self.wait(limit)
        except TimeoutError:
            run_status.end_by_force(self.directory)
            return self.wait(OVERTIME_S)

    def _grace_s(self) -> float:
        """Return launch.grace_s of this run; the default if its experiment cannot be read (a newer labkit wrote it)."""
        try:
            return self.experiment.launch.grace_s
        except ExperimentError:
            return Experiment().launch.grace_s

    def data(self) -> RunData:
        """Return the data of the run up to now; its `refresh()` reads what is new."""
        data = RunData(self.directory)
        data.refresh()
        return data

    def events(self) -> pd.DataFrame:
        """Return a row per rank and step: rank, step (from 1), seconds; the run's loss, samples, elapsed, grad_norm."""
        import numpy as np
        import pandas as pd

        data = self.data()
        per_step = pd.DataFrame(
            {
                "step": np.arange(data.first + 1, data.first + data.steps + 1),
                "elapsed": data.elapsed[: data.steps],
                "loss": data.loss,
                "samples": data.samples[: data.steps],
                "grad_norm": data.grad_norm[: data.steps],
            }
        )
        per_rank = [
            pd.DataFrame(
                {"rank": rank, "step": np.arange(data.first + 1, data.first + len(seconds) + 1), "seconds": seconds}
            )
            for rank, seconds in enumerate(data.seconds)
        ]
        table = (
            pd.concat(per_rank, ignore_index=True) if per_rank else pd.DataFrame(columns=["rank", "step", "seconds"])
        )
        return table.merge(per_step, on="step", how="left")

    def logs(self, rank: int = 0, lines: int = 50) -> str:
        """Return the last lines that a rank printed."""
        return "\n".join(logs.tail(self.directory.log(rank), lines))

    def summary(self) -> dict[str, Any]:
        """Return the summary, built from the events if the run has not written it (yet); keys: runs/summary.py."""
        stored = read_json(self.directory.summary)
        if isinstance(stored, dict):
            return stored
        from labkit.runs.summarize import summarize

        return summarize(self.directory).as_dict()

    def profile(self) -> RunProfile:
        """Return the step that torch.profiler recorded (`training.profile_step`): files, and the longest operations.

        `paths` are chrome traces, which https://ui.perfetto.dev opens; `rows` has ten operations per rank, the longest
        first; `notes` says what is missing and why.
        """
        from labkit.runs.profile import read_profile

        return read_profile(self.data())

    def checkpoints(self) -> list[int]:
        """Return the steps of the complete checkpoints in ascending order."""
        return self.directory.checkpoint_steps()

    def __repr__(self) -> str:
        return f"<Run {self.id}: {self.state}>"
