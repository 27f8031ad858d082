"""Nothing in labkit opens a file of a run directory but through `labkit.experiment.safe_files`.

Every call that could open a file is found in the source; those outside of that door stand in EXCEPTIONS, each with
what it opens instead.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import labkit

ROOT = Path(labkit.__file__).parent
DOOR = "experiment/safe_files.py"

OF_A_PATH = {"open", "read_text", "read_bytes", "write_text", "write_bytes"}
"""Methods of a path that open what stands there."""
BY_NAME = {
    *("open", "io.open", "os.open", "os.mkfifo", "os.fdopen", "gzip.open", "Image.open", "mmap.mmap"),
    *("np.load", "np.loadtxt", "np.fromfile", "np.memmap", "torch.load", "torch.save", "torch.from_file"),
    *("safe_open", "tempfile.mkstemp", "tempfile.NamedTemporaryFile", "shutil.copy", "shutil.copyfile", "shutil.move"),
}
FORMATS = {"load_file", "save_file", "safe_open"}
"""What opens files in safetensors."""

EXCEPTIONS = {
    # -- files of a run directory, where another door holds --
    "experiment/tensor_files.py:save_file": "safetensors writes by itself; what stood there has been removed",
    "experiment/tensor_files.py:load_file": "safetensors reads by itself, after a look at what stands there",
    "experiment/tensor_files.py:load_arrays": "safetensors reads by itself, after a look at what stands there",
    "sparsity/export.py:": "safetensors reads by itself, after a look at what stands there",
    "sparsity/export.py:load": "safetensors reads by itself, after a look at what stands there",
    "runs/liveness.py:hold": "the lock of a run, opened without following a link and without waiting",
    "runs/liveness.py:_inspect": "the lock of a run, opened without following a link and without waiting",
    # -- files that the user names --
    "cli/output.py:deliver": "where -o says",
    "experiment/schema.py:Experiment.load": "an experiment, by its name",
    "proofs/matrix_log.py:MatrixLog.__init__": "where --resume says",
    "proofs/matrix_log.py:MatrixLog.add": "where --resume says",
    "workloads/custom.py:Custom.code_of": "the user's code",
    "experiment/locate.py:why_not": "the user's code",
    "workloads/files.py:kind": "the user's data",
    "workloads/files.py:read_text": "the user's data",
    "workloads/hub_images.py:StoredImages.pixels": "the user's data",
    # -- files of labkit and of libraries --
    "workloads/digits.py:raw": "scikit-learn's digits",
    "workloads/driving_data.py:about": "labkit's own recording",
    "workloads/driving_data.py:load": "labkit's own recording",
    "workloads/driving_data.py:write": "labkit's own recording",
    "workloads/models/transformers.py:_source_of_model": "the source of a model in transformers",
    "experiment/machine.py:_torch_cuda": "torch's version",
    # -- no files of anybody --
    "cli/output.py:give_up_output": "/dev/null",
    "launch/client.py:_open_log": "/dev/null",
    "launch/standby.py:_fork_supervisor": "/dev/null",
    "launch/board.py:HeartbeatTable.__init__": "memory",
    "experiment/machine.py:_cpu": "the kernel tells it under /proc or /sys",
    "experiment/machine.py:_usable_cores": "the kernel tells it under /proc or /sys",
    "experiment/machine.py:_usable_memory": "the kernel tells it under /proc or /sys",
    "launch/descendants.py:_child_pids": "the kernel tells it under /proc or /sys",
    "netem/namespace.py:enter": "the kernel tells it under /proc or /sys",
    "netem/namespace.py:open_current": "the kernel tells it under /proc or /sys",
    "runs/processes.py:_stat": "the kernel tells it under /proc or /sys",
    "runs/processes.py:boot_id": "the kernel tells it under /proc or /sys",
    "runs/processes.py:machine": "the kernel tells it under /proc or /sys",
    "training/clock.py:PassClock.__init__": "the kernel tells it under /proc or /sys",
    "netem/counters.py:bytes_sent": "the kernel tells it under /proc or /sys",
    "workloads/mapped.py:_is_in_memory": "the kernel tells it under /proc or /sys",
    "experiment/process_memory.py:resident_bytes": "the kernel tells it under /proc or /sys",
    "gradients/updates/hogwild.py:Hogwild.load": "the private folder where ranks meet, made by the supervisor",
    "parallel/shared_memory.py:SharedMemory._connect": "the private folder where ranks meet, made by the supervisor",
    "parallel/shared_memory.py:SharedMemory._map": "the private folder where ranks meet, made by the supervisor",
}


def _calls(path: Path) -> Iterator[str]:
    """`file.py:function` of every call in a file that could open something past the door."""
    name = path.relative_to(ROOT).as_posix()
    yield from (f"{name}:{where}" for where in dict.fromkeys(_opened(ast.parse(path.read_bytes()), "")))


def _opened(node: ast.AST, where: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _opened(child, f"{where}.{child.name}".removeprefix("."))
            continue
        if isinstance(child, ast.Call) and _opens(child.func):
            yield where
        if isinstance(child, ast.ImportFrom) and (child.module or "").startswith("safetensors"):
            yield from (where for alias in child.names if alias.name in FORMATS)
        yield from _opened(child, where)


def _opens(function: ast.expr) -> bool:
    called = ast.unparse(function)
    if called.startswith("safe_files."):
        return False
    return called in BY_NAME or (isinstance(function, ast.Attribute) and function.attr in OF_A_PATH)


def test_files_of_a_run_directory_are_opened_by_one_door() -> None:
    calls = {call for path in sorted(ROOT.rglob("*.py")) for call in _calls(path) if not call.startswith(DOOR)}
    assert sorted(calls - EXCEPTIONS.keys()) == []
    assert sorted(EXCEPTIONS.keys() - calls) == [], "exceptions that nothing needs any more"


@pytest.mark.parametrize(
    "line",
    [
        "open(path)",
        "path.open('rb')",
        "directory.status.read_text()",
        "os.open(path, 0)",
        "np.load(path)",
        "from safetensors.torch import load_file",
    ],
)
def test_a_way_past_the_door_is_seen(line: str) -> None:
    assert list(_opened(ast.parse(f"def read():\n    {line}"), "")) == ["read"]


def test_the_door_itself_is_no_way_past_it() -> None:
    assert list(_opened(ast.parse("safe_files.read_bytes(path, 10)\nsafe_files.open_to_append(path)"), "")) == []
