"""Code of others runs only where that was asked for: not from a folder, a repository, or a run from elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from labkit.cli import main
from labkit.experiment.run_directory import RunDirectory, write_json
from labkit.runs import Run
from labkit.runs.environment import git_state, record
from tests.launch.helpers import SMALLEST, tiny

SOURCE = """
def make_task():
    import pathlib
    pathlib.Path({mark!r}).write_text("the code was run")
    raise ValueError("that is enough")
"""


@pytest.fixture
def foreign(tmp_path: Path, labkit_home: Path) -> tuple[Path, Path]:
    """A run directory with code of its own and a checkpoint, and the file that the code would write."""
    import torch

    from labkit.training import checkpoint

    mark = tmp_path / "mark"
    workload = {"name": "custom", "source": SOURCE.format(mark=str(mark)), "factory": "make_task"}
    experiment = tiny(1, 40, workload=workload).resolve()
    directory = RunDirectory(tmp_path / "downloaded")
    directory.path.mkdir()
    write_json(directory.experiment, experiment.to_dict())
    write_json(directory.status, {"state": "finished", "title": "a run"})
    checkpoint.save(directory, 1, experiment, checkpoint.Saved({"w": torch.ones(1)}, {}))
    return directory.path, mark


def test_a_run_given_by_path_that_carries_code_is_not_resumed_by_itself(
    foreign: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, mark = foreign
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
    assert main(["run", "--resume", str(folder)]) == 2
    err = capsys.readouterr().err
    assert "make_task" in err
    assert "--trust" in err
    assert Run.all() == []
    assert not mark.exists()
    assert main(["run", "--resume", str(folder), "--trust", "--json"]) == 1, "the code raises"
    assert mark.exists()


def test_somebody_at_a_terminal_is_asked(
    foreign: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, mark = foreign

    class Terminal:
        answer = "n\n"

        def isatty(self) -> bool:
            return True

        def readline(self) -> str:
            return self.answer

    monkeypatch.setattr(sys, "stdin", Terminal())
    assert main(["run", "--resume", str(folder)]) == 2
    assert "[y/N]" in capsys.readouterr().err
    assert not mark.exists()
    monkeypatch.setattr(Terminal, "answer", "y\n")
    assert main(["run", "--resume", str(folder)]) == 1
    assert mark.exists()


def test_show_says_that_a_run_executes_code(foreign: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder, mark = foreign
    assert main(["show", str(folder)]) == 0
    assert "this run executes the function make_task in 5 lines of source text" in capsys.readouterr().out
    assert main(["show", str(folder), "--json"]) == 0
    assert "make_task" in json.loads(capsys.readouterr().out)["code"]
    assert not mark.exists()


def test_a_builtin_workload_needs_no_trust(labkit_home: Path, tmp_path: Path) -> None:
    fields = {"workload": json.dumps(SMALLEST), "layout.dp_replicate": 1, "training.steps": 4, "launch.device": "cpu"}
    assert main(["run", "vision-ddp", *(f"--set={field}={value}" for field, value in fields.items()), "--json"]) == 0
    copy = tmp_path / "copy"
    shutil.copytree(Run.attach("last").directory.path, copy)
    assert main(["run", "--resume", str(copy), "--set=training.steps=8", "--json"]) == 0


# -- the current folder -----------------------------------------------------------------------------------------------

SHADOW = "raise SystemExit('the file in the current folder was imported')\n"


@pytest.fixture
def shadowed(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("accelerate", "random", "calendar", "torch", "numpy", "safetensors", "json"):
        (folder / f"{name}.py").write_text(SHADOW)
    return folder


def labkit(folder: Path, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = Path(sys.executable).parent / "labkit"
    environment = {**os.environ, "LABKIT_HOME": str(home)}
    return subprocess.run(
        [str(command), *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def test_a_file_in_the_current_folder_stands_in_for_no_library(shadowed: Path, labkit_home: Path) -> None:
    words = ["run", "vision-ddp", "--set", f"workload={json.dumps(SMALLEST)}", "--set", "training.steps=4"]
    done = labkit(shadowed, labkit_home, *words, "--ranks", "2", "--json")
    assert done.returncode == 0, done.stderr
    done = labkit(shadowed, labkit_home, "doctor")
    assert "cannot be imported" not in done.stdout
    assert "current folder" not in done.stdout + done.stderr


def test_a_task_of_the_current_folder_is_still_found(labkit_home: Path, tmp_path: Path) -> None:
    (tmp_path / "my_task.py").write_text(
        "import my_neighbour\n"
        "def make_task():\n"
        "    import torch\n"
        "    x = torch.randn(32, 4)\n"
        "    y = torch.zeros(32, dtype=torch.long)\n"
        "    return {'model': torch.nn.Linear(4, my_neighbour.CLASSES), 'train': (x, y), 'test': (x, y),\n"
        "            'loss_fn': torch.nn.CrossEntropyLoss()}\n"
    )
    (tmp_path / "my_neighbour.py").write_text("CLASSES = 2\n")
    workload = json.dumps({"name": "custom", "path": "my_task:make_task"})
    words = ["run", "vision-ddp", "--set", f"workload={workload}", "--set", "training.steps=4", "--ranks", "2"]
    done = labkit(tmp_path, labkit_home, *words, "--json")
    assert done.returncode == 0, done.stderr


# -- git --------------------------------------------------------------------------------------------------------------


def git(folder: Path, *words: str) -> None:
    settings = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", *settings, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> tuple[Path, Path]:
    """A repository whose configuration runs programs, and the file that they would write."""
    folder, mark = tmp_path / "repository", tmp_path / "mark"
    folder.mkdir()
    git(folder, "init")
    (folder / "file.txt").write_text("one")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "one")
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {mark}\ncat\n")
    program.chmod(0o755)
    git(folder, "config", "core.fsmonitor", str(program))
    git(folder, "config", "filter.mine.clean", str(program))
    git(folder, "config", "filter.mine.required", "true")
    (folder / ".gitattributes").write_text("*.txt filter=mine\n")
    return folder, mark


def test_git_runs_nothing_that_a_repository_names(repository: tuple[Path, Path]) -> None:
    folder, mark = repository
    (folder / "file.txt").write_text("two")
    state = git_state(str(folder))
    assert not mark.exists()
    assert state is not None
    assert state["changed"] is True
    assert len(state["commit"]) == 40


@pytest.mark.alone
def test_a_git_that_hangs_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "git").write_text("#!/bin/sh\nexec sleep 30\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("labkit.runs.environment.GIT_TIMEOUT_S", 1.0)
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    begun = time.monotonic()
    thread = record(directory, str(tmp_path))
    assert time.monotonic() - begun < 0.9
    known: dict[str, Any] = json.loads(directory.environment.read_text())
    assert known["git"] is None
    assert known["host"]
    thread.join(10)
    assert thread not in threading.enumerate()
    assert json.loads(directory.environment.read_text()) == known


def test_git_state_comes_to_the_environment_of_a_run(repository: tuple[Path, Path], tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    record(directory, str(repository[0])).join(20)
    assert json.loads(directory.environment.read_text())["git"]["changed"] is False
