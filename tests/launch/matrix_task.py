"""A custom task with a fault that the environment describes: LABKIT_FAULT = JSON {rank, when, how, at}."""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import get_worker_info

SPEC: dict[str, Any] = json.loads(os.environ.get("LABKIT_FAULT") or "{}")
GUILTY = bool(SPEC) and int(os.environ.get("RANK", "0")) == SPEC.get("rank", 1)
AT = SPEC.get("at", 10)
CALLS = dict.fromkeys(("data", "loader", "forward", "eval", "loss"), 0)


class Wordless(Exception):
    def __str__(self) -> str:
        raise RuntimeError("cannot say")


def _raise(error: BaseException) -> None:
    raise error


def _loop() -> None:
    while True:
        pass


def _ignore_term() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(1)


def _flood(write: Callable[[], Any]) -> None:
    while True:
        write()


def _leave_a_process() -> None:
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(300,), daemon=True).start()


FAULTS: dict[str, Callable[[], Any]] = {
    "exception": lambda: _raise(ValueError("bad data of this rank")),
    "surrogate": lambda: _raise(ValueError("bad file \udcff\ud800 here")),
    "control": lambda: _raise(ValueError("\x1b[2J\x07 evil\r\nsecond")),
    "wordless": lambda: _raise(Wordless()),
    "empty": lambda: _raise(ValueError("")),
    "keyboard": lambda: _raise(KeyboardInterrupt()),
    "memory": lambda: _raise(MemoryError()),
    "stop iteration": lambda: _raise(StopIteration()),
    "exit 0": lambda: sys.exit(0),
    "exit 3": lambda: sys.exit(3),
    "exit 75": lambda: sys.exit(75),
    "exit text": lambda: sys.exit("I leave"),
    "_exit 0": lambda: os._exit(0),
    "_exit 1": lambda: os._exit(1),
    "_exit 75": lambda: os._exit(75),
    "loop": _loop,
    "loop with the lock": lambda: ctypes.PyDLL(None).sleep(3600),
    "ignore SIGTERM": _ignore_term,
    "segfault": lambda: ctypes.string_at(0),
    "abort": os.abort,
    "flood": lambda: _flood(lambda: sys.stdout.write("y" * 65536)),
    "flood of lines": lambda: _flood(lambda: print("x" * 1000)),
    "child": lambda: subprocess.Popen(["sleep", "300"]),
    "daemon": lambda: subprocess.Popen(["sleep", "300"], start_new_session=True),
    "fork": _leave_a_process,
    "child, exception": lambda: (subprocess.Popen(["sleep", "300"]), _raise(ValueError("left a child"))),
    "stdio": lambda: os.closerange(0, 3),
    "parent SIGKILL": lambda: (os.kill(os.getppid(), signal.SIGKILL), time.sleep(5)),
    "parent SIGTERM": lambda: os.kill(os.getppid(), signal.SIGTERM),
    "parent SIGINT": lambda: os.kill(os.getppid(), signal.SIGINT),
    "parent SIGSTOP": lambda: os.kill(os.getppid(), signal.SIGSTOP),
}


def fault() -> None:
    how = SPEC["how"]
    if how.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, how))
        time.sleep(0.3)
    else:
        FAULTS[how]()


def _strike(when: str) -> None:
    if when in CALLS:
        CALLS[when] += 1
    if GUILTY and SPEC["when"] == when and CALLS.get(when, AT) == AT:
        fault()


class Data:
    """Samples by index; the fault strikes in the loader process where there is one."""

    def __init__(self) -> None:
        self.x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
        self.y = (self.x.sum(1) > 0).long()

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, indices: Any) -> dict[str, Tensor]:
        _strike("data" if get_worker_info() is None else "loader")
        chosen = torch.as_tensor(indices)
        return {"x": self.x[chosen], "y": self.y[chosen]}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 2)
        self.pause_s = float(os.environ.get("LABKIT_PAUSE", "0"))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            time.sleep(self.pause_s)
        if not self.training:
            _strike("eval")
        elif torch.is_grad_enabled():  # in the proofs before step 1 it is not, and an exception there ends the proof
            _strike("forward")
        output = self.layer(x)
        if GUILTY and SPEC["when"] == "backward" and output.requires_grad and CALLS["forward"] == AT:
            output.register_hook(lambda gradient: (fault(), None)[1])
        return output


def loss_fn(output: Tensor, y: Tensor) -> Tensor:
    _strike("loss")
    return nn.functional.cross_entropy(output, y)


def make_task() -> dict[str, Any]:
    torch.manual_seed(0)
    _strike("build")
    with contextlib.suppress(ImportError):
        _inside_labkit()
    return {"model": Network(), "train": Data(), "test": Data(), "loss_fn": loss_fn, "metric": "accuracy"}


def _inside_labkit() -> None:
    """Strike inside labkit's own work, in this rank alone."""
    if GUILTY and SPEC["when"] == "save":
        from labkit.experiment import run_directory  # noqa: F401  (the folder is made by the checkpoint)
        from labkit.training import checkpoint

        write = checkpoint.save

        def half(directory: Any, step: int, *arguments: Any, **more: Any) -> Any:
            partial = directory.checkpoint(step).with_name(f".step-{step:08d}.partial")
            partial.mkdir(parents=True, exist_ok=True)
            (partial / "model.safetensors").write_bytes(b"half")
            fault()
            return write(directory, step, *arguments, **more)

        checkpoint.save = half
    if GUILTY and SPEC["when"] == "end":
        from labkit.training.runtime import Runtime

        end = Runtime.end

        def ending(self: Any) -> None:
            end(self)
            fault()

        Runtime.end = ending  # type: ignore[method-assign]
