"""What every lesson has, seen without executing it."""

from __future__ import annotations

import ast
import base64
import re

import pytest

from tests.notebooks.lesson import FOLDER, LESSONS, ROOT, Lesson

WIDTH = 92
MAX_STORED_BYTES = 150_000

pytestmark = pytest.mark.parametrize("lesson", [Lesson(path) for path in LESSONS], ids=lambda lesson: lesson.name)


def names_used(source: str) -> set[str]:
    """Names that are read in a cell (cells that begin with a magic are no Python)."""
    if source.startswith("%%"):
        return set()
    return {
        node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }


def test_every_parameter_is_used(lesson: Lesson) -> None:
    """A knob that does nothing is a lie in the first cell."""
    used = set().union(*(names_used(cell.source) for cell in lesson.code))
    assert lesson.parameters
    assert lesson.parameters <= used


def test_it_goes_from_a_question_to_claims_to_exercises(lesson: Lesson) -> None:
    text = "\n".join(cell.source for cell in lesson.notebook.cells if cell.cell_type == "markdown")
    assert text.startswith(f"# {lesson.name[:2]} · ")
    parts = ("**The question.**", "## The idea", "by hand", "## What you should have seen", "## Exercises")
    at = 0
    for part in parts:
        at = text.lower().find(part.lower(), at)
        assert at >= 0, f"{part!r} is missing, or not in its place"
    assert "to read" in text


def test_every_exercise_has_a_check_and_a_folded_solution(lesson: Lesson) -> None:
    assert len(lesson.exercises) >= 3
    for exercise, check, solution in lesson.exercises:
        answer = re.fullmatch(r"(\w+) = None", exercise.source)
        assert answer, "an exercise begins unanswered"
        assert f"if {answer[1]} is None" in check.source, "an open exercise must not stop the notebook"
        assert re.search(rf"\b{answer[1]}\b", solution), "the solution gives the answer its name"
    for cell in lesson.cells("solution"):
        assert cell.source.startswith("<details>\n<summary>")
        assert cell.source.endswith("</details>")


def test_every_assertion_says_what_it_claims(lesson: Lesson) -> None:
    asserts = [node for node in ast.walk(ast.parse(lesson.claims)) if isinstance(node, ast.Assert)]
    assert len(asserts) >= 5
    assert all(isinstance(node.msg, ast.Constant) and isinstance(node.msg.value, str) for node in asserts)


def test_pictures_are_those_of_the_folder_and_can_be_read_aloud(lesson: Lesson) -> None:
    """Attached, so that a copy of the notebook keeps them; PNG, because JupyterLab attaches no SVG."""
    shown = 0
    for cell in lesson.notebook.cells:
        for name, bundle in cell.get("attachments", {}).items():
            assert base64.b64decode(bundle["image/png"]) == (FOLDER / "images" / name).read_bytes(), name
            assert re.search(rf"!\[[^\]]{{20,}}\]\(attachment:{re.escape(name)}\)", cell.source), (
                "no words for the picture"
            )
            shown += 1
    assert shown


def test_lines_fit_beside_a_sidebar(lesson: Lesson) -> None:
    long = [line for cell in lesson.code for line in cell.source.splitlines() if len(line) > WIDTH]
    assert not long
    assert f"line-length = {WIDTH}" in (FOLDER / "ruff.toml").read_text(encoding="utf-8")


def test_it_is_small_and_in_the_guide(lesson: Lesson) -> None:
    assert lesson.path.stat().st_size <= MAX_STORED_BYTES
    assert lesson.path.name in (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")
