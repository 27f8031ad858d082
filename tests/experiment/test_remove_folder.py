"""A folder is removed with what is in it, and a path that was put together wrongly removes nothing.

The deletion itself is replaced wherever the path leads out of the test's own folder.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest

from labkit.experiment import safe_files


@pytest.fixture
def removed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the paths that would have been removed; nothing is."""
    paths: list[Any] = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: paths.append(path))
    return paths


def test_a_folder_goes_with_what_is_in_it(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "link").symlink_to(outside)
    safe_files.remove_folder(folder)
    assert not folder.exists()
    assert (outside / "kept").exists()


@pytest.mark.parametrize("name", ["/", "..", ".", "", "../..", "~", "a/../.."])
def test_a_path_that_leads_out_removes_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: list[Any]
) -> None:
    run = tmp_path / "home" / "run"
    (run / "a").mkdir(parents=True)
    monkeypatch.chdir(run)
    monkeypatch.setenv("HOME", str(run))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(run))
    path = Path(name).expanduser() if name == "~" else run / name
    if path.is_dir():
        with contextlib.suppress(ValueError):
            safe_files.remove_folder(path)
    assert all(not run.is_relative_to(place) for place in removed)


def test_the_root_the_home_and_the_folder_of_temporary_files_stay(removed: list[Any]) -> None:
    import tempfile

    for place in (Path("/"), Path.home(), Path.cwd(), Path(tempfile.gettempdir())):
        with pytest.raises(ValueError, match="is never removed"):
            safe_files.remove_folder(place)
    assert not removed


def test_what_is_a_link_or_a_file_stays(tmp_path: Path, removed: list[Any]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link", "nothing"):
        safe_files.remove_folder(tmp_path / name)
    assert not removed
