"""The meeting place is private, and what a killed supervisor left is swept away."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from labkit.launch import rendezvous


@pytest.fixture(autouse=True)
def _own_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(folder))


@pytest.fixture
def folder() -> Iterator[Path]:
    """A temporary directory with a short path."""
    path = Path(tempfile.mkdtemp(prefix="lk", dir="/tmp"))
    yield path
    shutil.rmtree(path)


def test_only_its_owner_may_enter() -> None:
    meeting = rendezvous.make_folder()
    assert stat.S_IMODE(meeting.path.stat().st_mode) == 0o700
    meeting.remove()
    assert not meeting.path.exists()


def test_what_a_dead_supervisor_left_goes_and_what_a_living_one_has_stays(folder: Path) -> None:
    code = f"import tempfile; tempfile.tempdir = {str(folder)!r}; from labkit.launch import rendezvous as r; "
    dead = Path(
        subprocess.run(
            [sys.executable, "-c", code + "print(r.make_folder().path)"], check=True, capture_output=True, text=True
        ).stdout.strip()
    )
    (dead / "store").write_text("left behind")
    foreign = folder / "labkit-meet-by-hand"
    foreign.mkdir()
    mine = rendezvous.make_folder()
    again = rendezvous.make_folder()
    assert not dead.exists()
    assert mine.path.exists()
    assert again.path.exists()
    assert foreign.exists()
    assert str(os.getpid()) in mine.path.name


def test_a_meeting_of_another_container_stays_while_it_lives(folder: Path) -> None:
    """The pid in its name means nothing here: only its lock counts."""
    mine = rendezvous.make_folder()
    other = folder / "labkit-meet-999999-1-77-abc"
    other.mkdir()
    code = (
        "import sys; from pathlib import Path; from labkit.runs import liveness as l; "
        f"lock = l.hold(Path({str(other / '.alive')!r})); print('held', flush=True); input()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    rendezvous.make_folder()
    assert other.exists()
    process.kill()
    process.wait(10)
    rendezvous.make_folder()
    assert not other.exists()
    assert mine.path.exists()


def test_a_deep_temporary_directory_is_passed_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = folder / ("x" * 100) / ("y" * 100)
    deep.mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    meeting = rendezvous.make_folder()
    assert len(str(meeting.path)) <= rendezvous.MAX_PATH_LENGTH
    meeting.remove()
