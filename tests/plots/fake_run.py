"""Run directories as the engine leaves them, without training anything: for the tests of what reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from labkit.experiment import Experiment
from labkit.experiment.recipes import vision_ddp
from labkit.experiment.run_directory import RunDirectory, write_json

EXPERIMENT = vision_ddp().replace("training.steps=200", "training.global_batch=128")
METRIC = {"key": "accuracy", "title": "Held-out accuracy", "higher_is_better": True, "unit": "%"}


class FakeRun:
    """A run directory that grows when told to. Quacks like labkit.runs.run.Run where the lab needs it."""

    def __init__(
        self, root: Path, name: str, experiment: Experiment | None = None, ranks: int = 2, **status: Any
    ) -> None:
        experiment = experiment or EXPERIMENT
        self.experiment = experiment.replace(f"layout.dp_replicate={ranks}")
        path = root / "runs" / name
        path.mkdir(parents=True)
        self.directory = RunDirectory(path)
        self.ranks, self.steps, self.clock = ranks, 0, 1000.0
        self.pace = 1.0
        """So many times as many steps does it take to learn the same."""
        self.status: dict[str, Any] = {}
        self.asked_to_stop = False
        self._random = np.random.default_rng(0)
        write_json(self.directory.experiment, self.experiment.to_dict())
        write_json(self.directory.environment, {"host": "here", "versions": {"python": "3.11"}})
        self.set(
            run_id=name,
            title=self.experiment.title,
            state="running",
            created=1.0,
            started=1.0,
            ended=None,
            world_size=ranks,
            device="cpu",
            layout=str(self.experiment.layout),
            workload="vision",
            steps=self.experiment.training.steps,
            ranks=[],
            warnings=[],
            cause=None,
            **status,
        )
        for rank in range(ranks):
            extra = {"metric": METRIC, "facts": {"classes": 10}} if rank == 0 else {}
            self.event(rank, "start", device="cpu", pid=1, threads=1, parameters=1000, first=0, **extra)

    @property
    def id(self) -> str:
        return self.directory.id

    @property
    def state(self) -> str:
        return str(self.status["state"])

    @property
    def done(self) -> bool:
        return self.state in ("finished", "stopped", "failed")

    @property
    def title(self) -> str:
        return str(self.status["title"])

    def set(self, **changes: Any) -> None:
        self.status |= changes
        write_json(self.directory.status, self.status)

    def event(self, rank: int, kind: str, **fields: Any) -> None:
        line = {"event": kind, "rank": rank, "time": self.clock, "monotonic": self.clock} | fields
        with open(self.directory.events(rank), "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def advance(self, count: int, step_s: Any = 0.02, evaluate: bool = True, **columns: Any) -> FakeRun:
        """Write `count` more steps of a plausible training; `columns`: more of each step, a number or a list."""
        number = np.arange(self.steps, self.steps + count)
        at = number / self.pace
        for rank in range(self.ranks):
            seconds = np.asarray(step_s) * (1 + 0.05 * np.abs(self._random.standard_normal(count)))
            loss = 2.3 * np.exp(-at / 60) + 0.08 + 0.12 * np.abs(self._random.standard_normal(count)) * np.exp(-at / 90)
            self.clock = self.clock + float(seconds.sum()) if rank == 0 else self.clock
            usual = {"data": 0.001, "forward": 0.005, "backward": 0.01, "optimizer": 0.001, "grad_norm": 1.0}
            each = {
                name: value if isinstance(value, list) else [value] * count for name, value in (usual | columns).items()
            }
            self.event(
                rank,
                "steps",
                first=self.steps,
                loss=loss.round(5).tolist(),
                samples=[128 // self.ranks] * count,
                seconds=seconds.round(6).tolist(),
                **each,
            )
        self.steps += count
        if evaluate:
            accuracy = 0.985 - 0.88 * float(np.exp(-self.steps / self.pace / 40))
            self.event(0, "evaluation", step=self.steps, metrics={"loss": 0.3, "accuracy": accuracy}, seconds=0.1)
        entries = [
            {"rank": rank, "step": self.steps, "phase": "backward", "silent_s": 0.1, "memory_bytes": 300 * 2**20}
            for rank in range(self.ranks)
        ]
        write_json(self.directory.progress, {"time": 0.0, "ranks": entries})
        return self

    def trace(self) -> FakeRun:
        """Every rank looks closely at one update, in megabytes."""
        sizes = dict.fromkeys(("parameters", "gradients", "optimizer", "activations"), 2**20)
        counts = {"calls": 2, "bytes": 2**20, "wire_bytes": 2**20, "exposed_seconds": 0.003}
        for rank in range(self.ranks):
            self.event(rank, "trace", step=4, memory=sizes, formula=sizes, traffic={"dp_replicate": counts})
        return self

    def train(self, steps: int = 200, step_s: float = 0.02, every: int = 20, **columns: Any) -> FakeRun:
        """Run to the end."""
        for _ in range(steps // every):
            self.advance(every, step_s, **columns)
        return self.end("finished")

    def end(self, state: str, **more: Any) -> FakeRun:
        for rank in range(self.ranks):
            self.event(rank, "end", step=self.steps, reason=state)
        self.set(state=state, ended=2.0, **more)
        return self

    def request_stop(self, grace: float | None = None) -> None:
        self.asked_to_stop = True
        self.end("stopped")

    def wait(self, timeout: float | None = None) -> FakeRun:
        assert self.done
        return self

    def logs(self, rank: int, lines: int = 50) -> str:
        return f"log of rank {rank}"


def combined(
    root: Path,
    name: str,
    *changes: str,
    sent: float = 10 * 2**20,
    compression_s: float = 0.0,
    pace: float = 1.0,
    mbit: float | None = 200.0,
    every: int = 1,
    steps: int = 200,
    ranks: int = 2,
) -> FakeRun:
    """A finished run whose ranks combine what they learned, each sending `sent` bytes once in `every` steps over a
    link that they share.

    A step computes 20 ms (without a limit the link takes 10 ms); `changes` as after --set.
    """
    experiment = EXPERIMENT.replace(f"training.steps={steps}", f"layout.dp_replicate={ranks}", *changes)
    if mbit is not None:
        experiment = experiment.set({"launch.network": {"rate_mbit": mbit}})
    run = FakeRun(root, name, experiment, ranks)
    run.pace = pace
    travels = 0.01 * sent / 10 / 2**20 if mbit is None else ranks * sent * 8 / (mbit * 1e6)
    meets = [(step + 1) % every == 0 for step in range(steps)]
    exposed = [travels if meet else 0.0 for meet in meets]
    for first in range(0, steps, 20):
        part = slice(first, first + 20)
        run.advance(
            20,
            [0.02 + compression_s + seconds for seconds in exposed[part]],
            bytes=[sent if meet else 0 for meet in meets[part]],
            exposed=exposed[part],
            compression=compression_s,
            forward=0.006,
            backward=[0.012 + compression_s + (seconds if every == 1 else 0.0) for seconds in exposed[part]],
            optimizer=[0.001 + (seconds if every > 1 else 0.0) for seconds in exposed[part]],
        )
    mean = sent * sum(meets) / steps
    for rank in range(ranks):
        run.event(rank, "communication", bytes_per_step=mean, counted_bytes_per_step=mean, formula_bytes_per_step=mean)
    return run.end("finished")


def drawn(root: Path, name: str, *changes: str, stale: list[int], steps: int = 200, ranks: int = 2) -> FakeRun:
    """A finished run in which ranks drew their work; gradients were so old as `stale` says, again and again."""
    experiment = EXPERIMENT.replace(f"training.steps={steps}", f"layout.dp_replicate={ranks}", *changes)
    run = FakeRun(root, name, experiment, ranks)
    for number in range(steps):
        run.clock += 0.02
        loss = 2.3 * float(np.exp(-number / 60)) + 0.08
        for rank in range(ranks):
            ticket = number * ranks + rank
            columns = {"ticket": ticket, "ended": run.clock, "staleness": stale[ticket % len(stale)], "loss": loss}
            columns |= {"samples": 128 // ranks, "seconds": 0.02, "data": 0.001, "forward": 0.006, "backward": 0.011}
            columns |= {"optimizer": 0.002, "bytes": 1000, "exposed": 0.001, "compression": 0.0}
            run.event(rank, "steps", first=number, **{key: [value] for key, value in columns.items()})
        if (number + 1) % 20 == 0:
            run.clock += 5.0
            run.event(0, "evaluation", step=number + 1, metrics={"loss": 0.3, "accuracy": 0.9}, seconds=5.0)
    return run.end("finished")
