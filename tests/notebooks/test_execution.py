"""Every notebook as CI runs it: executed by papermill, without a browser, its own assertions holding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Each is meant to end within about two minutes on two cores; the limit leaves room for a busy machine.
LIMIT_S = 360
MAX_BYTES = 300_000


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_stays_small(path: Path, tmp_path: Path) -> None:
    executed = tmp_path / path.name
    done = subprocess.run(
        [sys.executable, "-m", "papermill", str(path), str(executed), "-k", "python3", "--no-progress-bar"],
        cwd=tmp_path,  # whatever a notebook writes beside itself lands here
        env={
            **os.environ,
            "LABKIT_UI": "static",
            "LABKIT_HOME": str(tmp_path / "home"),
            # The kernel is started by the name `python`: the one that runs these tests.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        },
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "unknown parameter" not in done.stderr.lower()

    size = executed.stat().st_size
    assert size <= MAX_BYTES, f"{size} bytes executed: a figure carries its library, or a table is too long"
    notebook = nbformat.read(executed, as_version=4)  # type: ignore[no-untyped-call]
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert outputs, "a lesson that shows nothing"
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert "application/vnd.jupyter.widget-view+json" not in kinds, "static mode shows no widget"


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS
