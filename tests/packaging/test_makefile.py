"""The commands that a newcomer types first."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAKE = shutil.which("make") or ""

pytestmark = pytest.mark.skipif(not MAKE, reason="make is not installed")


def make(*arguments: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [MAKE, "-C", str(folder), "--no-print-directory", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
        env={**{k: v for k, v in os.environ.items() if not k.startswith("MAKE")}, **environment},
    )


def test_make_alone_lists_what_there_is() -> None:
    shown = make()
    assert shown.returncode == 0
    targets = set(re.findall(r"^  make ([a-z-]+) ", shown.stdout, re.M))
    assert {
        "demo",
        "lab",
        "test",
        "proofs",
        "exhaustive",
        "check",
        "notebooks",
        "browser",
        "gpu",
        "benchmarks",
        "clean",
        "help",
    } <= targets


def test_an_old_python_gets_one_clear_sentence(tmp_path: Path) -> None:
    """Nothing is installed, and the sentence says what is needed and how to name another interpreter."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    old = tmp_path / "python-old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = make("demo", f"PYTHON={old}", folder=tmp_path)
    assert done.returncode != 0
    assert "labkit needs Python 3.11 or later" in done.stderr
    assert "make PYTHON=" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_the_set_up_runs_again_only_when_the_requirements_change(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    log = tmp_path / "pip.log"
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" >> "{log}"\n')
    python.chmod(0o755)

    def installs() -> int:
        done = make("set-up", "PIP_ARGS=--quiet", folder=tmp_path)
        assert done.returncode == 0, done.stderr
        return len(log.read_text().splitlines())

    assert installs() == 1
    assert installs() == 1
    assert (
        log.read_text().strip()
        == "-m pip install -q --disable-pip-version-check --quiet -c constraints.txt -e .[lab,hub,gpu,dev]"
    )
    later = (tmp_path / ".venv/.set-up-dev").stat().st_mtime + 5
    os.utime(tmp_path / "constraints.txt", (later, later))
    assert installs() == 2


def test_another_torch_has_an_environment_of_its_own() -> None:
    planned = make("-n", "test", "TORCH=2.11.0")
    assert planned.returncode == 0, planned.stderr
    assert ".venv-torch-2.11.0/bin/python -m pytest " in planned.stdout
    assert "tests/training/test_layouts.py" in planned.stdout
    assert 'echo "torch==2.11.0"' in planned.stdout
    assert ".venv/bin/python" not in planned.stdout
