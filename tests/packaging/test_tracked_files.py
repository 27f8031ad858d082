"""What may not be in the repository: pickles, a machine's paths, addresses in the set-up, outputs in notebooks."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import nbformat
import papermill
import pytest

ROOT = Path(__file__).parents[2]
SET_UP = [
    "pyproject.toml",
    "constraints.txt",
    "environment.yml",
    "binder/environment.yml",
    "binder/postBuild",
    "binder/start",
    "Makefile",
    ".ci/run",
    ".pre-commit-config.yaml",
    "tests/browser/find_browser.py",
]
PICKLES = {"pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
PICKLED_FILES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib", ".pt2")
# Somebody's home, or where a build happened to stand. `~` and paths of the system are fine.
MACHINE_PATH = re.compile(r"(?<![\w.~/$}])/(?:home|Users|root|work|workspace|mnt)/[\w.-]+")
MAX_FILE_BYTES = 8 * 2**20


def tracked() -> list[Path]:
    """The files that git has or would take; all files where this is no git checkout."""
    git = shutil.which("git")
    if git and (ROOT / ".git").exists():
        command = [git, "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
        return sorted({ROOT / name for name in names if name and (ROOT / name).is_file()})
    skipped = {".venv", "build", "dist", "demo-output", "test-output"}
    return [path for path in sorted(ROOT.rglob("*")) if path.is_file() and not skipped & set(path.parts)]


def text_of(path: Path) -> str:
    """The file's text, empty for a binary one."""
    content = path.read_bytes()
    return "" if b"\0" in content[:4096] else content.decode("utf-8")


def pickle_uses(source: str) -> list[str]:
    """Where a source file imports a pickling module, or calls a loader that may unpickle."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [f"line {node.lineno}: import {name}" for name in names if name.split(".")[0] in PICKLES]
        if not isinstance(node, ast.Call):
            continue
        called, keywords = ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        if called == "torch.save" or called.endswith((".read_pickle", ".to_pickle")):
            found.append(f"line {node.lineno}: {called}")
        if called == "torch.load" and ast.unparse(keywords.get("weights_only", ast.Constant(None))) != "True":
            found.append(f"line {node.lineno}: torch.load without weights_only=True")
        if "allow_pickle" in keywords and ast.unparse(keywords["allow_pickle"]) != "False":
            found.append(f"line {node.lineno}: allow_pickle")
    return found


FILES = tracked()
NOTEBOOKS = [path for path in FILES if path.suffix == ".ipynb"]
SOURCES = [path for path in FILES if path.suffix == ".py" and path.is_relative_to(ROOT / "labkit")]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_no_file_is_a_pickle_or_very_large() -> None:
    assert not [relative(path) for path in FILES if path.suffix in PICKLED_FILES]
    assert not [relative(path) for path in FILES if path.stat().st_size > MAX_FILE_BYTES]


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_source_file_pickles(path: Path) -> None:
    assert not pickle_uses(text_of(path))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import dumps",
        "def late():\n    import dill",
        "torch.save(model, path)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "frame.to_pickle(path)",
    ],
)
def test_pickling_is_found(source: str) -> None:
    assert len(pickle_uses(source)) == 1


def test_no_file_names_a_path_of_a_machine() -> None:
    found = [
        f"{relative(path)}:{number}: {match[0]}"
        for path in FILES
        for number, line in enumerate(text_of(path).splitlines(), 1)
        if (match := MACHINE_PATH.search(line))
    ]
    assert not found


@pytest.mark.parametrize("name", SET_UP)
def test_the_set_up_names_no_host(name: str) -> None:
    """Which index, mirror or proxy is used is the machine's business (PIP_ARGS, pip's and conda's own settings)."""
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "://" not in text
    assert not re.search(r"--(extra-)?index-url|--find-links|--trusted-host", text)


def test_there_is_a_notebook() -> None:
    assert {"00_start_here.ipynb", "01_data_parallelism.ipynb"} <= {path.name for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=relative)
def test_notebooks_are_valid_and_stored_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    nbformat.validate(notebook)
    assert "widgets" not in notebook.metadata
    assert notebook.metadata.kernelspec.name == "python3"
    for number, cell in enumerate(notebook.cells):
        assert cell.cell_type != "code" or (not cell.outputs and cell.execution_count is None), f"cell {number}"


def parameters(path: Path) -> set[str]:
    """The names that papermill itself finds in the notebook's `parameters` cell; there is exactly one such cell."""
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1, f"{path.name} needs exactly one cell tagged `parameters`"
    return set(papermill.inspect_notebook(str(path)))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=relative)
def test_every_notebook_has_the_common_parameters(path: Path) -> None:
    assert {"ui", "device"} <= parameters(path)


def test_every_parameter_given_to_papermill_exists() -> None:
    """papermill injects an unknown name with a mere warning, and the notebook runs with its defaults."""
    checked = 0
    for path in FILES:
        if path.suffix not in ("", ".md", ".py", ".yml", ".yaml", ".sh") or path == Path(__file__):
            continue
        for command in re.findall(r"papermill\s(?:[^\n]*\\\n)*[^\n]*", text_of(path)):
            notebook = re.search(r"[\w./-]+\.ipynb", command)
            names = re.findall(r"\s(?:-p|-r|--parameters)\s+(\w+)", command)
            if notebook and names:
                assert set(names) <= parameters(ROOT / notebook[0]), f"{relative(path)}: {command}"
                checked += 1
    assert checked, "no papermill command was found: the demo in the Makefile is one"
