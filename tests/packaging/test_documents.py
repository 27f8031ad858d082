"""The documents: links lead somewhere, and what is said of settings and results is what the code has."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from labkit.cli.reference import settings_page
from labkit.cli.results_reference import result_fields, results_page
from labkit.experiment.fields import fields

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("notebooks/**/*.md"), *ROOT.glob("tests/**/*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_to_files(page: Path) -> None:
    targets = [target for target in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def test_the_page_of_settings_is_made_from_the_fields() -> None:
    page = (ROOT / "notebooks" / "reference" / "settings.md").read_text(encoding="utf-8")
    assert page == settings_page(fields()), "make it again: labkit fields --markdown > notebooks/reference/settings.md"


def test_the_page_of_results_is_made_from_their_fields() -> None:
    page = (ROOT / "notebooks" / "reference" / "results.md").read_text(encoding="utf-8")
    command = "labkit fields --results --markdown > notebooks/reference/results.md"
    assert page == results_page(result_fields()), f"make it again: {command}"


def test_every_key_of_a_result_is_explained() -> None:
    described = result_fields()
    assert len(described) > 100
    assert not [field for field in described if not field.kind or not field.description.endswith(".")]


def test_the_table_of_faults_names_tests_that_exist() -> None:
    table = (ROOT / "tests" / "FAULTS.md").read_text(encoding="utf-8")
    files = list((ROOT / "tests").rglob("*.py"))
    known = {name for file in files for name in re.findall(r"def (test_\w+)", file.read_text(encoding="utf-8"))}
    known |= {file.stem for file in files}
    shortened = {name for name, dots in re.findall(r"\b(test_\w+)(…?)", table) if dots}
    named = set(re.findall(r"\b(test_\w+)", table))
    assert len(named) > 100
    missing = {name for name in named - known if name not in shortened}
    assert not missing | {name for name in shortened if not any(full.startswith(name) for full in known)}


OWN_METHODS = (ROOT / "notebooks" / "reference" / "own_methods.md").read_text(encoding="utf-8")


@pytest.mark.alone
@pytest.mark.parametrize("example", re.findall(r"```python\n(.*?)```", OWN_METHODS, re.DOTALL))
def test_the_example_of_an_own_method_runs(example: str, tmp_path: Path, labkit_home: Path) -> None:
    (tmp_path / "cell.py").write_text(example)
    command = [sys.executable, str(tmp_path / "cell.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    subprocess.run([sys.executable, "-m", "labkit", "stop", "--all"], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
