"""Logs: their last lines, whatever stands in them, and a cap that does not disturb the writer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from labkit.runs import logs


def test_tail(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.log"
    assert logs.tail(path) == []
    path.write_bytes(b"".join(b"line %d\n" % number for number in range(1000)))
    assert logs.tail(path, 3) == ["line 997", "line 998", "line 999"]
    path.write_bytes(b"\xff\xfe broken \xe2\x80\n no end of line")
    assert logs.tail(path)[-1] == " no end of line"
    path.write_bytes(b"x" * 10_000_000)
    assert len("".join(logs.tail(path, 5))) <= 2000, "bounded, also for one endless line"


@pytest.mark.parametrize("size", [0, 1000, 1001, 50_000])
def test_a_log_that_grows_too_long_keeps_its_end(tmp_path: Path, size: int) -> None:
    path = tmp_path / "rank-0.log"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)  # as a rank holds it
    os.write(descriptor, b"a" * (size - 4) + b"end\n" if size else b"")
    logs.cap(path, limit=1000)
    os.write(descriptor, b"after\n")
    os.close(descriptor)
    text = path.read_bytes()
    assert text.endswith(b"after\n")
    assert b"\0" not in text, "no hole where the writer used to be"
    if size > 1000:
        assert b"only its end is kept" in text
        assert b"end\nafter\n" in text
        assert len(text) < 500
    else:
        assert len(text) == size + len(b"after\n")


def test_a_log_that_is_not_there_is_no_trouble(tmp_path: Path) -> None:
    logs.cap(tmp_path / "nowhere.log")


def test_a_link_in_place_of_a_log_is_not_followed(tmp_path: Path) -> None:
    outside, path = tmp_path / "outside", tmp_path / "rank-0.log"
    outside.write_bytes(b"x" * 5000)
    path.symlink_to(outside)
    logs.cap(path, limit=1000)
    assert outside.read_bytes() == b"x" * 5000
    assert path.is_symlink()
