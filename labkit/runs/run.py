"""The handle of a run, shaped like a Future. All it knows comes from the run directory.

So a kernel that was restarted, a second notebook and the command line can each hold the same run.
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
from labkit.runs.liveness import Life, look

if TYPE_CHECKING:
    import pandas as pd

POLL_S = 0.05
OVERTIME_S = 10.0
"""Beyond the grace period, how long a supervisor gets to end its ranks before it is killed itself."""


class RunFailed(RuntimeError):
    """The run ended as failed; the message is its cause, and `kind` the kind of that."""

    def __init__(self, message: str, kind: str | None = None) -> None:
        super().__init__(message)
        self.kind = kind


class Run:
    """A run that is going on or has ended.

    `state` is one of starting, running, stopping, finished, stopped, failed.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory

    @classmethod
    def attach(cls, reference: str | os.PathLike[str] = "last") -> Run:
        """The run with this id, at this path, or the `last` one; FileNotFoundError if there is none."""
        return cls(RunDirectory.find(reference))

    @classmethod
    def all(cls) -> list[Run]:
        """All runs under LABKIT_HOME, oldest first."""
        return [cls(directory) for directory in RunDirectory.all()]

    @property
    def id(self) -> str:
        return self.directory.id

    @property
    def title(self) -> str:
        """The name for people; free text, to be escaped before it meets HTML."""
        return str(run_status.read(self.directory).get("title") or self.id)

    @property
    def experiment(self) -> Experiment:
        """What was run, with device and layout resolved."""
        return Experiment.of_run(self.directory)

    @property
    def status(self) -> dict[str, Any]:
        """The status as far as it can be told from here; the owner of a run whose supervisor is gone writes its end."""
        return run_status.reconcile(self.directory)

    @property
    def state(self) -> str:
        return str(self.status["state"])

    @property
    def done(self) -> bool:
        return self.state in TERMINAL

    @property
    def cause(self) -> dict[str, Any] | None:
        """Why it was stopped or failed: kind, message, rank, exception, signal, log."""
        return self.status.get("cause")

    def wait(self, timeout: float | None = None) -> Run:
        """Until the run has ended; TimeoutError after `timeout` seconds (the run goes on)."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.done:
            if deadline is not None and time.monotonic() > deadline:
                status = self.status
                why = status.get("notice") or "it goes on"
                raise TimeoutError(f"run {self.id} is still {status['state']} after {timeout:g} s; {why}")
            time.sleep(POLL_S)
        return self

    def result(self, timeout: float | None = None) -> dict[str, Any]:
        """Wait and return the summary; RunFailed with the cause if the run failed."""
        if self.wait(timeout).state == "failed":
            cause = self.cause or {}
            raise RunFailed(cause.get("message", "failed"), cause.get("kind"))
        return self.summary()

    def request_stop(self, grace: float | None = None) -> None:
        """Ask the run to finish its step, write a checkpoint and end; returns at once.

        `grace` (s) is the time for that before ranks are ended by force; None takes launch.grace_s.
        """
        status = run_status.stored(self.directory)
        if status is None or status["state"] not in TERMINAL or look(self.directory.alive) is Life.ALIVE:
            request = {"requested": time.time(), "grace_s": grace}
            run_status.write_even_if_full(self.directory, self.directory.stop, request)

    def stop(self, grace: float | None = None) -> Run:
        """Ask the run to stop and wait for its end. Bounded: a supervisor that does not obey is killed.

        TimeoutError if it has not ended then and cannot be ended from here.
        """
        self.request_stop(grace)
        bound = (self._grace_s() if grace is None else grace) + OVERTIME_S
        try:
            return self.wait(bound)
        except TimeoutError:
            run_status.end_by_force(self.directory)
            return self.wait(OVERTIME_S)

    def _grace_s(self) -> float:
        """launch.grace_s of this run; the usual one where its experiment cannot be read (a newer labkit wrote it)."""
        try:
            return self.experiment.launch.grace_s
        except ExperimentError:
            return Experiment().launch.grace_s

    def data(self) -> RunData:
        """The numbers of the run, read up to now; `refresh()` reads on."""
        data = RunData(self.directory)
        data.refresh()
        return data

    def events(self) -> pd.DataFrame:
        """One row per rank and step: rank, step (1-based), seconds, and for the whole run loss, samples, elapsed."""
        import numpy as np
        import pandas as pd

        data = self.data()
        whole = pd.DataFrame(
            {
                "step": np.arange(data.first + 1, data.first + data.steps + 1),
                "elapsed": data.elapsed[: data.steps],
                "loss": data.loss,
                "samples": data.samples[: data.steps],
                "grad_norm": data.grad_norm[: data.steps],
            }
        )
        ranks = [
            pd.DataFrame(
                {"rank": rank, "step": np.arange(data.first + 1, data.first + len(seconds) + 1), "seconds": seconds}
            )
            for rank, seconds in enumerate(data.seconds)
        ]
        table = pd.concat(ranks, ignore_index=True) if ranks else pd.DataFrame(columns=["rank", "step", "seconds"])
        return table.merge(whole, on="step", how="left")

    def logs(self, rank: int = 0, lines: int = 50) -> str:
        """The last lines that a rank printed."""
        return "\n".join(logs.tail(self.directory.log(rank), lines))

    def summary(self) -> dict[str, Any]:
        """The summary; built from the events if the run has not written it (yet)."""
        written = read_json(self.directory.summary)
        if isinstance(written, dict):
            return written
        from labkit.runs import summary

        return summary.build(self.directory)

    def checkpoints(self) -> list[int]:
        """Steps of the complete checkpoints, rising."""
        return self.directory.checkpoint_steps()

    def __repr__(self) -> str:
        return f"<Run {self.id}: {self.state}>"
