"""A process that ignores the current folder finds the labkit that started it, from a checkout too. CPU, no run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import labkit
from labkit.launch.client import import_path

ROOT = str(Path(labkit.__file__).resolve().parents[1])


@pytest.mark.parametrize("place", [0, 1])
def test_a_checkout_is_passed_on_wherever_it_is_searched(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own task puts its folder in front of all others (labkit.experiment.locate)."""
    folders = [entry for entry in sys.path if entry not in ("", ROOT)]
    monkeypatch.setattr(sys, "path", [*folders[:place], ROOT, *folders[place:]])
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert import_path() == {"PYTHONPATH": os.pathsep.join(["/elsewhere", ROOT])}
    monkeypatch.setenv("PYTHONPATH", ROOT)
    assert import_path() == {}


def test_an_installed_labkit_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ROOT)])
    monkeypatch.chdir("/")
    assert import_path() == {}
