"""The project file, the constraints and the conda environments say the same thing."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import labkit

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
ENVIRONMENT, BINDER = (ROOT / "environment.yml", ROOT / "binder/environment.yml")
# Names that differ on conda-forge.
CONDA_NAMES = {"pytorch": "torch", "pytorch-cpu": "torch", "matplotlib-base": "matplotlib"}
NOTEBOOK_PACKAGES = {"ipython", "ipykernel", "ipywidgets", "anywidget", "plotly", "nbformat", "papermill", "notebook"}
# What a CUDA build of torch brings is of that build's making and is not pinned here.
ACCELERATOR = re.compile(r"nvidia-.*|cuda-.*|triton.*|pytorch-triton.*")


def direct() -> dict[str, Requirement]:
    """The requirements that this project itself names, by canonical name."""
    lines = [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


def constraints() -> dict[str, str]:
    """Canonical name -> exact version."""
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)", line)
            assert match, f"not NAME==VERSION (no local label, no path, no marker): {line}"
            pins[canonicalize_name(match[1])] = match[2]
    return pins


def closure(*extras: str) -> set[str]:
    """Canonical names of everything that installing labkit with these extras brings here, from installed metadata."""
    waiting = [Requirement(f"labkit[{','.join(extras)}]")]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement = waiting.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        for line in metadata.requires(requirement.name) or []:
            further = Requirement(line)
            choices = [{"extra": extra} for extra in (*requirement.extras, "")]
            if further.marker is None or any(further.marker.evaluate(choice) for choice in choices):
                waiting.append(further)
    return {name for name, _ in seen} - {"labkit"}


def conda(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """(conda packages, pip packages) of an environment file, each PyPI name -> version range."""
    packages, pip = {}, {}
    for entry in yaml.safe_load(path.read_text(encoding="utf-8"))["dependencies"]:
        lines, into = (entry["pip"], pip) if isinstance(entry, dict) else ([entry], packages)
        for line in lines:
            match = re.fullmatch(r"([A-Za-z0-9._-]+?)((?:[<>=!~].*)?)", line)
            assert match, line
            into[canonicalize_name(CONDA_NAMES.get(match[1], match[1]))] = match[2]
    return packages, pip


def test_constraints_cover_and_fit_every_direct_dependency() -> None:
    pins = constraints()
    for name, requirement in direct().items():
        assert name in pins, f"{name} has no line in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{name}=={pins[name]} is outside {requirement.specifier}"


def test_constraints_cover_everything_that_comes_along() -> None:
    missing = {
        name for name in closure("lab", "hub", "gpu", "dev") - set(constraints()) if not ACCELERATOR.fullmatch(name)
    }
    assert not missing, f"not pinned in constraints.txt: {sorted(missing)}"


def test_constraints_name_nothing_that_is_not_needed() -> None:
    assert set(constraints()) <= closure("lab", "hub", "gpu", "dev"), "constraints.txt pins what nothing asks for"


def test_every_direct_dependency_is_bounded() -> None:
    """The engine and the lab must not break on a new major version; a developer's tool may be open above."""
    for line in [*PROJECT["dependencies"], *EXTRAS["lab"], *EXTRAS["hub"], *EXTRAS["gpu"]]:
        operators = {specifier.operator for specifier in Requirement(line).specifier}
        assert operators == {">=", "<"}, line


@pytest.mark.parametrize(
    ("name", "refused", "reason"),
    [
        ("torch", "2.9.1", "loading weights could run code (CVE-2026-24747)"),
        ("jupyter-server", "2.17.0", "cookies survived a change of password (CVE-2026-40934)"),
        ("plotly", "8.0.0", "its share button is turned off for 7 only"),
    ],
)
def test_security_floors_hold(name: str, refused: str, reason: str) -> None:
    assert not direct()[name].specifier.contains(refused), reason
    for path in (ENVIRONMENT, BINDER):
        specifier = Requirement(name + conda(path)[0][name]).specifier
        assert not specifier.contains(refused), f"{path}: {reason}"


def test_the_oldest_torch_that_installs_is_the_oldest_that_is_tested() -> None:
    """issue 11, A11: below 2.11 some layouts do not compute what one process computes, and newer ones may not."""
    (oldest,) = [each.version for each in direct()["torch"].specifier if each.operator == ">="]
    assert Version(oldest) >= Version("2.11")
    jobs = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^\s+torch: \[(.+)\]$", jobs, re.MULTILINE)
    versions = [Version(text.strip(' "')) for text in listed.split(",")]
    assert "make test TORCH=${{ matrix.torch }}" in jobs
    assert min(versions).release[:2] == Version(oldest).release[:2]
    assert max(versions) > Version(constraints()["torch"]), "the newest torch beside the pinned one"


def test_the_engine_installs_without_any_notebook_package() -> None:
    engine = closure()
    unwanted = {name for name in engine if name in NOTEBOOK_PACKAGES or "jupyter" in name}
    assert not unwanted, f"`pip install labkit` would bring {sorted(unwanted)}"
    assert {"torch", "accelerate", "highway-env"} <= engine  # the walk did walk
    assert {"jupyterlab", "ipython", "plotly"} <= closure("lab")


def test_the_installed_package_is_this_one() -> None:
    distribution = metadata.distribution("labkit")
    assert distribution.version == labkit.__version__
    assert distribution.metadata["License-Expression"] == "Apache-2.0"
    assert [entry.value for entry in distribution.entry_points if entry.name == "labkit"] == ["labkit.cli:main"]


def test_the_changelog_has_this_version() -> None:
    assert f"\n## [{labkit.__version__}] - " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text
    assert all(f"\n   {section}. " in text for section in range(1, 10))
    assert "END OF TERMS AND CONDITIONS" in text


def test_binders_environment_mirrors_the_main_one() -> None:
    def parsed(path: Path) -> Any:
        return yaml.safe_load(path.read_text(encoding="utf-8"))

    mirror, main = parsed(BINDER), parsed(ENVIRONMENT)
    mirror["dependencies"] = [
        entry.replace("pytorch-cpu", "pytorch", 1) if isinstance(entry, str) else entry
        for entry in mirror["dependencies"]
    ]
    assert mirror == main
    assert any(str(entry).startswith("pytorch-cpu>=") for entry in parsed(BINDER)["dependencies"])


@pytest.mark.parametrize("path", [ENVIRONMENT, BINDER], ids=["main", "binder"])
def test_conda_ranges_are_those_of_the_project(path: Path) -> None:
    packages, pip = conda(path)
    # repo2docker takes Python's version from a line with a single `=`; it does not see `>=`.
    assert packages["python"] == "=3.11"
    wanted = {canonicalize_name(Requirement(line).name): str(Requirement(line).specifier) for line in users()}
    given = {
        name: str(Requirement(name + text).specifier) for name, text in {**packages, **pip}.items() if name in wanted
    }
    assert given == wanted
    beside = set(packages) | set(pip)
    assert beside - set(wanted) == {"python", "pip", "matplotlib"}
    # A local line here (`-e .`) would switch off repo2docker's cached assembly.
    assert set(pip) == {"highway-env"}


def users() -> list[str]:
    """What somebody who uses the lab needs: all but the developer's tools."""
    return [*PROJECT["dependencies"], *EXTRAS["lab"], *EXTRAS["hub"]]


@pytest.mark.parametrize("name", ["binder/postBuild", "binder/start", ".ci/run"])
def test_scripts_are_executable_and_stop_on_errors(name: str) -> None:
    path = ROOT / name
    text = path.read_text(encoding="utf-8")
    assert os.access(path, os.X_OK)
    assert text.startswith("#!")
    if name == "binder/start":
        assert text.rstrip().endswith('exec "$@"')
        assert "export LABKIT_STANDBY=0" in text
    else:
        assert re.search(r"^set -e", text, re.M), "repo2docker and bash ignore errors otherwise"


def test_python_is_new_enough_for_the_project() -> None:
    assert PROJECT["requires-python"] == ">=3.11"
    assert sys.version_info >= (3, 11)
