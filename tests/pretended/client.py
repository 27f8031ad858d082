"""The caller's side of `rank.py`: runs experiments on pretended GPUs and reads the reports of their ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from labkit.experiment import Experiment, Machine
from labkit.experiment.machine import Gpu

ROOT = Path(__file__).resolve().parents[2]
BASE: dict[str, Any] = {
    "workload": {
        "name": "language",
        "width": 32,
        "depth": 2,
        "heads": 4,
        "context": 16,
        "max_characters": 20_000,
    },
    "training.steps": 8,
    "training.global_batch": 8,
    "training.evaluate_every": 8,
    "training.checkpoint_every": 8,
    "training.trace_step": 3,
    "optimizer.clip_norm": 1.0,
    "launch.device": "cuda",
}


@dataclass(frozen=True)
class Report:
    """What the ranks of one run had to say."""

    errors: list[str]
    """How each rank ended; empty for a rank that trained to the end."""
    losses: list[float]
    """Losses of the first rank that has some."""
    faults: list[str]
    """What fails on a GPU, each once."""
    waits: dict[str, float]
    """Waits of the host for the GPU, per step, on the rank that has most of each."""
    steps: int
    """Steps of the first rank whose waits were counted."""

    @classmethod
    def of(cls, answer: dict[str, Any]) -> Report:
        """Read the answer of `rank.py`."""
        ranks = answer["ranks"]
        waits: dict[str, float] = {}
        for rank in ranks:
            for text, count in rank.get("waits", {}).items():
                waits[text] = max(count, waits.get(text, 0.0))
        faults = [*(fault for rank in ranks for fault in rank.get("faults", [])), *answer["order"]]
        losses = next((rank["losses"] for rank in ranks if rank.get("losses")), [])
        steps = max((rank.get("steps", 0) for rank in ranks), default=0)
        return cls([rank["error"] for rank in ranks], losses, list(dict.fromkeys(faults)), waits, steps)


class PretendedGpus:
    """A process that runs experiments, one after another; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._runs = folder, 0
        command = [sys.executable, "-m", "tests.pretended.rank"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)

    def __enter__(self) -> PretendedGpus:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def run(self, gpus: int, experiment: Experiment, plant: str = "nothing", deadline_s: float = 120.0) -> Report:
        """Run an experiment on so many GPUs; `plant` names a function of planted.py that ranks call."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._runs += 1
        job = {
            "experiment": experiment.to_dict(),
            "gpus": gpus,
            "ranks": experiment.layout.world_size,
            "folder": str(self._folder / str(self._runs)),
            "plant": plant,
            "deadline_s": deadline_s,
        }
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that runs experiments ended with exit code {self._process.wait(30)}")
        return Report.of(json.loads(answer))


def machine(gpus: int) -> Machine:
    """Return a machine with so many GPUs."""
    cards = tuple(Gpu(index, f"GPU-{index}", "H100", 80 << 30, 0, (9, 0)) for index in range(gpus))
    return Machine(2, 2, 2**33, cards, torch_cuda="13.0")


def experiment_of(gpus: int, changes: str, **more: Any) -> Experiment:
    """Return a small experiment with changes as after `--set`, for so many GPUs; a workload may be named whole."""
    base = BASE | more
    if "workload=" in changes:
        name = changes.split("workload=")[1].split()[0]
        base |= {"workload": {"name": name} | SMALL[name]}
        changes = " ".join(part for part in changes.split() if not part.startswith("workload="))
    return Experiment().set(base).replace(*changes.split()).resolve(machine(gpus))


SMALL: dict[str, dict[str, Any]] = {
    "vision": {"image_size": 8},
    "driving": {"width": 16, "depth": 2, "episodes": 1},
}
"""Options of workloads other than the language model."""
