"""The meeting place is private, and what a killed supervisor left is swept away."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from labkit.launch import rendezvous


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def test_only_its_owner_may_enter() -> None:
    folder = rendezvous.make_folder()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_what_a_dead_supervisor_left_goes_and_what_a_living_one_has_stays(tmp_path: Path) -> None:
    code = f"import tempfile; tempfile.tempdir = {str(tmp_path)!r}; from labkit.launch import rendezvous as r; "
    dead = Path(
        subprocess.run(
            [sys.executable, "-c", code + "print(r.make_folder())"], check=True, capture_output=True, text=True
        ).stdout.strip()
    )
    (dead / "store").write_text("left behind")
    foreign = tmp_path / "labkit-meet-by-hand"
    foreign.mkdir()
    mine = rendezvous.make_folder()
    again = rendezvous.make_folder()
    assert not dead.exists()
    assert mine.exists()
    assert again.exists()
    assert foreign.exists()
    assert str(os.getpid()) in mine.name
