"""Every recipe of notebooks/reference/adding.md, followed to the letter in a copy of the code."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.alone]

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(?:python|text) (\S+)(?: (\w+))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SMALL = {
    "workload": {"name": "vision", "model": "vit", "image_size": 8, "depth": 2},
    "training.steps": 6,
    "training.evaluate_every": 6,
    "training.checkpoint_every": 0,
    "layout.dp_replicate": 2,
    "launch.device": "cpu",
}
ADDED: dict[str, dict[str, Any]] = {
    "scaled_half": {"gradients.compression": {"method": "scaled_half", "scale": 512.0}},
    "every_third": {"gradients.update.method": "every_third"},
    "checkerboard": {"sparsity": {"method": "checkerboard", "target": 0.5}},
    "rounded_bf16": {"quantization.training": "rounded_bf16"},
    "eager_gpipe": {"layout": {"pp": 2, "microbatches": 2, "schedule": "eager_gpipe"}},
    "xor": {"workload": {"name": "xor", "width": 8}},
}
PROGRAM = """
import json, sys
import labkit
from labkit.ui.form import ExperimentForm
from labkit.plots.last_losses import last_losses

small, added = json.loads(sys.argv[1])
runs = {}
for name, changes in added.items():
    experiment = labkit.Experiment().set(small | changes)
    assert experiment.problems() == [], (name, experiment.problems())
    form = ExperimentForm(labkit.Experiment())
    [field] = [f for f in changes if name in json.dumps(changes[f])][:1]
    chosen = [entry for entry in form.entries.values() if (name, name) in getattr(entry.widget, "options", ())]
    assert chosen, f"{name} is not in the form"
    runs[name] = labkit.run(experiment, baseline=None)
    runs[name].result(timeout=120)
sent = runs["scaled_half"].summary()["communication"]
assert sent["counted_bytes_per_step"] == sent["formula_bytes_per_step"]
assert abs(runs["checkerboard"].summary()["effective"]["sparsity"] - 0.5) < 0.02
exact = {"quantization.training": "fp64", "training.gradient_norm": True}
exact = labkit.Experiment().set(small | added["xor"] | exact)
layouts = {"one": {}, "tp": {"tp": 2}, "pp": {"pp": 2, "microbatches": 2}}
cut = {name: labkit.run(exact.set({"layout": layout}), baseline=None) for name, layout in layouts.items()}
for run in cut.values():
    run.result(timeout=120)
    assert abs(run.data().loss - cut["one"].data().loss).max() < 1e-9, "the layout computes what one process computes"
    assert abs(run.data().grad_norm - cut["one"].data().grad_norm).max() < 1e-9
[problem] = exact.set({"layout.tp": 3, "layout.dp_replicate": 1}).problems()
assert problem.reason == "3 ranks do not divide 16 hidden units", problem
picture = last_losses(list(runs.values()))
assert len(picture.rows) == len(runs)
print("all recipes work")
"""


@pytest.fixture(scope="module")
def copy_with_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the package to which every recipe was applied."""
    folder = tmp_path_factory.mktemp("recipes")
    shutil.copytree(ROOT / "labkit", folder / "labkit", ignore=shutil.ignore_patterns("__pycache__"))
    page = (ROOT / "notebooks" / "reference" / "adding.md").read_text(encoding="utf-8")
    for path, table, text in BLOCK.findall(page):
        target = folder / path
        if not table:
            assert not target.exists()
            target.write_text(text)
            continue
        lines = target.read_text().splitlines(keepends=True)
        begin = next(number for number, line in enumerate(lines) if line.startswith(f"{table} = "))
        ends = ("    ],\n", ")\n")
        end = next(number for number, line in enumerate(lines) if number > begin and line in ends)
        lines[end:end] = [text]
        target.write_text("".join(lines))
    yield folder
    environment = {**os.environ, "PYTHONPATH": str(folder), "LABKIT_HOME": str(folder / "home")}
    subprocess.run([sys.executable, "-m", "labkit", "stop", "--all"], env=environment, capture_output=True, timeout=60)


def test_what_a_recipe_adds_is_in_the_form_and_trains(copy_with_all: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(copy_with_all), "LABKIT_HOME": str(copy_with_all / "home")}
    command = [sys.executable, "-P", "-c", PROGRAM, json.dumps([SMALL, ADDED])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, cwd=copy_with_all)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "all recipes work"


def test_what_a_recipe_adds_passes_the_linter(copy_with_all: Path) -> None:
    command = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), "labkit"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=copy_with_all)
    assert done.returncode == 0, done.stdout[-3000:]
