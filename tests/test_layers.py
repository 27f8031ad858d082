"""The floors of the house: every room imports only downwards, and the kernel's side imports no torch."""

from __future__ import annotations

import ast
import graphlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import labkit

PACKAGE = Path(labkit.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# What each room may import, itself apart. The two wings meet in `experiment` only.
METHODS = {"parallel", "gradients", "sparsity", "quantization", "workloads"}
FLOORS: dict[str, set[str]] = {
    "experiment": set(),
    "workloads": {"experiment"},
    # A plan for cutting layers names the layers: that room stands one floor above the models.
    # It also hands its buckets to what combines gradients.
    "parallel": {"experiment", "workloads", "gradients"},
    "gradients": {"experiment"},
    "sparsity": {"experiment", "workloads"},
    "quantization": {"experiment"},
    "netem": {"experiment"},
    "training": {"experiment", "netem", *METHODS},
    "runs": {"experiment"},
    "plots": {"experiment", "runs"},
    "launch": {"experiment", "netem", "runs"},
    "proofs": {"experiment", "runs", "launch"},
    "ui": {"experiment", "runs", "launch", "plots"},
    "cli": {"experiment", "runs", "launch", "plots", "proofs"},
    "__main__": {"cli"},
    # labkit/__init__.py: the public names of all rooms, imported when first used; its version may be read by all.
    "": {"experiment", "workloads", "runs", "launch", "plots", "proofs", "ui"},
}
NOTEBOOK_PACKAGES = {
    "IPython",
    "ipykernel",
    "ipywidgets",
    "anywidget",
    "plotly",
    "jupyter_client",
    "jupyterlab",
    "papermill",
}
ENGINE = {"experiment", "netem", "training", "runs", "launch", "proofs", *METHODS}


def room(module: str) -> str:
    """`labkit.runs.data` is in `runs`; `labkit` itself is in the room ''."""
    return [*module.split("."), ""][1]


def module_name(path: Path) -> str:
    parts = ("labkit", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_file_or_room(dotted: str) -> bool:
    target = PACKAGE.joinpath(*dotted.split(".")[1:])
    return target.with_suffix(".py").is_file() or target.is_dir()


def imports(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, dotted module) of every import statement, wherever in the file it stands."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative import"
            base = node.module or ""
            for alias in node.names:
                deeper = f"{base}.{alias.name}"
                # `from labkit import runs` imports the room `runs`, `from labkit import __version__` a name.
                found.append((node.lineno, deeper if base == "labkit" and is_file_or_room(deeper) else base))
    return found


def breaches(here: str, source: str) -> list[str]:
    """What the floors forbid in a file of the room `here`."""
    found = []
    for line, name in imports(ast.parse(source)):
        top = name.split(".")[0]
        if top == "labkit":
            there = room(name)
            if there and there != here and there not in FLOORS[here]:
                found.append(f"line {line}: {here or 'labkit'} imports {name}")
        elif here in ENGINE and top in NOTEBOOK_PACKAGES:
            found.append(f"line {line}: the engine imports {name}")
    return found


def test_every_room_has_a_floor() -> None:
    rooms = {room(module_name(path)) for path in FILES}
    assert rooms <= set(FLOORS), "a new room needs a line in FLOORS"


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_name(path))
def test_imports_go_downwards_only(path: Path) -> None:
    assert not breaches(room(module_name(path)), path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("here", "source"),
    [
        ("experiment", "from labkit.runs.data import RunData"),
        ("experiment", "def late():\n    from labkit import training"),
        ("workloads", "import labkit.training.loop"),
        ("training", "from labkit.runs import Run"),
        ("runs", "from labkit.plots import figures"),
        ("plots", "if True:\n    import labkit.ui"),
        ("launch", "from labkit.training.worker import main"),
        ("training", "import plotly.graph_objects as go"),
        ("runs", "from IPython.display import display"),
    ],
)
def test_a_breach_is_found(here: str, source: str) -> None:
    assert len(breaches(here, source)) == 1


def loaded_by(statement: str) -> set[str]:
    """Top-level packages in a fresh interpreter after the statement."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "module",
    [
        "labkit",
        "labkit.experiment",
        "labkit.experiment.recipes",
        "labkit.runs",
        "labkit.plots",
        "labkit.launch",
        "labkit.ui",
        "labkit.cli",
    ],
)
def test_the_kernels_side_imports_no_torch(module: str) -> None:
    assert not loaded_by(f"import {module}") & {"torch", "accelerate", "transformers", "gymnasium", "highway_env"}


def test_checking_an_experiment_imports_no_torch() -> None:
    """A form shows its problems while somebody types; loading torch for that would take seconds."""
    statement = "from labkit.experiment.recipes import RECIPES\nfor make in RECIPES.values():\n    make().problems()\n"
    assert not loaded_by(statement) & {"torch", "accelerate", "transformers", "highway_env"}


@pytest.mark.parametrize("module", ["labkit.training.worker", "labkit.launch.supervisor", "labkit.launch.standby"])
def test_a_rank_imports_no_notebook_package(module: str) -> None:
    assert not loaded_by(f"import {module}") & NOTEBOOK_PACKAGES


def test_the_command_line_starts_without_notebook_packages() -> None:
    """`labkit run` is there on a bare node, where the extra `lab` is not installed."""
    assert not loaded_by("import labkit.cli") & NOTEBOOK_PACKAGES


def imports_when_loaded(tree: ast.Module) -> set[str]:
    """Return the modules of labkit that a file imports while it is being imported itself (not within functions)."""
    names, waiting = set(), list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        ):
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom) and node.module:
            deeper = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {name if is_file_or_room(name) else node.module for name in deeper}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.split(".")[0] == "labkit"}


def test_no_modules_import_each_other() -> None:
    """Modules in a circle can be imported in one order only; `import labkit.x` from a notebook is another one."""
    graph = {module_name(path): imports_when_loaded(ast.parse(path.read_text(encoding="utf-8"))) for path in FILES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_the_lowest_room_loads_no_other() -> None:
    """A method's module imports `labkit.experiment`; were that to load the methods, neither could come first."""
    code = "import importlib, json, pkgutil, sys, labkit.experiment as room\n"
    code += (
        "for module in pkgutil.iter_modules(room.__path__): importlib.import_module(f'{room.__name__}.{module.name}')\n"
    )
    code += "print(json.dumps([name for name in sys.modules if name.startswith('labkit.')]))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    assert {room(name) for name in json.loads(done.stdout)} == {"experiment"}


@pytest.mark.exhaustive
def test_every_module_can_be_imported_first() -> None:
    program = Path(__file__).parent / "packaging/imports_first.py"
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=900)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


MOST_LINES = 400
LONG_TESTS = {
    "launch/test_faults.py": "one list of what can happen to a run",
    "runs/test_data.py": "one list of what can stand in a file of events",
    "notebooks/test_execution.py": "the lessons are executed once, and all is asked of that",
    "training/test_rehearsal.py": "one list of what a rehearsal finds",
    "training/odd_tasks.py": "one task after the other",
    "training/test_own_models.py": "one list of own models",
    "parallel/test_refusals.py": "one list of refusals",
}
"""Files of tests that are longer, and why they are one."""


def test_every_file_holds_one_idea() -> None:
    tests = Path(__file__).parent
    long = {
        path
        for root in (PACKAGE, tests)
        for path in root.rglob("*.py")
        if len(path.read_text().splitlines()) > MOST_LINES
    }
    assert sorted(path.relative_to(PACKAGE) for path in long if path.is_relative_to(PACKAGE)) == []
    assert {path.relative_to(tests).as_posix() for path in long if path.is_relative_to(tests)} <= LONG_TESTS.keys()
