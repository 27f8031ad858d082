"""Whatever a run directory holds, every command ends soon, in sentences, and touches nothing outside of it."""

from __future__ import annotations

import json
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from labkit.cli import main
from labkit.experiment.run_directory import RunDirectory
from labkit.runs import run as run_module
from tests.runs import hostile
from tests.runs.record import record

WITHIN_S = 9
MEMORY_BYTES = 6 * 2**30
"""Of address space, most of which Python's libraries only reserve."""
STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def dashboard(directory: RunDirectory) -> int:
    """What the dashboard and the Lab draw."""
    from labkit.ui.lab import Lab

    lab = Lab("vision-ddp", ui="static")
    try:
        lab.attach(str(directory.path))
    except FileNotFoundError:  # no file of its own says what was run
        return 2
    picture = lab.picture()
    assert "<b>" not in picture.summary
    return 0


def command(*words: str) -> Callable[[RunDirectory], int]:
    return lambda directory: main([str(directory.path) if word == "RUN" else word for word in words])


COMMANDS: dict[str, Callable[[RunDirectory], int]] = {
    "runs": command("runs"),
    "runs --json": command("runs", "--json"),
    "show": command("show", "RUN"),
    "show --json": command("show", "RUN", "--json"),
    "compare": command("compare", "RUN"),
    "compare --all --json": command("compare", "--all", "--json"),
    "report": command("report", "RUN"),
    "stop": command("stop", "RUN", "--grace", "0"),
    "stop --all --json": command("stop", "--all", "--grace", "0", "--json"),
    "dashboard": dashboard,
}


@pytest.fixture(autouse=True)
def bounded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """End whatever takes longer than the bound, also where it waits for a pipe."""

    def over(number: int, frame: Any) -> None:
        raise AssertionError(f"not within {WITHIN_S} s")

    monkeypatch.setattr(run_module, "OVERTIME_S", 0.2)
    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, WITHIN_S)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def assert_told_in_sentences(code: int, out: str, err: str, name: str) -> None:
    assert code in (0, 1, 2), err
    assert "Traceback" not in out + err
    assert not STEERS.search(out + err), ascii(STEERS.findall(out + err))
    if code == 2 and not name.startswith("dashboard"):
        assert err.startswith("labkit: "), err
    if name.endswith("--json") and code == 0:
        json.loads(out.splitlines()[-1])


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("change", hostile.CHANGES)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_hostile_directory_harms_no_command(
    change: str, name: str, labkit_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    record(labkit_home, "20250101-0000-innocent", [0.01] * 20)
    directory = hostile.make(labkit_home, outside, change)
    before = everything_in(outside)
    try:
        code = COMMANDS[name](directory)
    finally:
        out, err = capsys.readouterr()
    assert_told_in_sentences(code, out, err, name)
    assert everything_in(outside) == before, "a file outside was changed"
    assert not Path("/nowhere").exists()
    if name in ("runs", "runs --json"):
        assert code == 0
        assert "20250101-0000-innocent" in out, "an innocent run is still listed"


@pytest.mark.parametrize("kind", hostile.NAMES)
@pytest.mark.parametrize("name", COMMANDS)
def test_the_name_of_a_directory_steers_nothing(
    kind: str, name: str, labkit_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = hostile.make(labkit_home, tmp_path, "untouched", hostile.NAMES[kind])
    code = COMMANDS[name](directory)
    out, err = capsys.readouterr()
    assert_told_in_sentences(code, out, err, name)


def test_a_home_full_of_them_is_listed_with_little_memory(labkit_home: Path, tmp_path: Path) -> None:
    for number, change in enumerate(hostile.CHANGES):
        outside = tmp_path / f"outside-{number}"
        outside.mkdir()
        hostile.make(labkit_home, outside, change, f"2026-{number}")
    record(labkit_home, "20250101-0000-innocent", [0.01] * 20)
    signal.setitimer(signal.ITIMER_REAL, 0)  # three commands, each in a process that has its own limit
    for words in (["runs", "--all"], ["compare", "--all"], ["show"]):
        done = subprocess.run(
            [sys.executable, "-m", "labkit", *words],
            capture_output=True,
            text=True,
            timeout=60,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES)),
        )
        assert_told_in_sentences(done.returncode, done.stdout, done.stderr, " ".join(words))
        assert words == ["show"] or "20250101-0000-innocent" in done.stdout, done.stderr


def test_all_commands_are_crossed_with_enough_directories() -> None:
    assert len(hostile.CHANGES) >= 49
    assert len(COMMANDS) == 10
