"""Whatever is at a path, under whatever name: bounded content or one refusal; nothing waits, and no link is followed.

Names are drawn without a slash and never lead out of the test's own folder, and nothing here removes a folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from labkit.experiment import safe_files

# What waits is ended by the limit on the test.
pytestmark = pytest.mark.timeout(60)

LIMIT = 1000
SECRET = b'{"outside": true}'
ODD = ["a\0b", "half\ud83d", "\udcff", "x" * 300, "\x1b[2J", " ", "-rf", "stop.json", "...", "~"]

any_text = st.text(st.characters(exclude_categories=()), max_size=40)
names = st.text(
    st.characters(exclude_categories=(), exclude_characters="/"), min_size=1, max_size=40
) | st.sampled_from(ODD)
contents = st.binary(max_size=2 * LIMIT) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(any_text, below, max_size=3),
    max_leaves=10,
).map(lambda value: json.dumps(value).encode())


def hole(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10 * 2**30)


def bound_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


KINDS: dict[str, Callable[[Path, Path, bytes], Any]] = {
    "nothing": lambda path, outside, content: None,
    "file": lambda path, outside, content: path.write_bytes(content),
    "hole": lambda path, outside, content: hole(path),
    "pipe": lambda path, outside, content: os.mkfifo(path),
    "socket": lambda path, outside, content: bound_socket(path),
    "folder": lambda path, outside, content: path.mkdir(),
    "link": lambda path, outside, content: path.symlink_to(outside),
    "dangling link": lambda path, outside, content: path.symlink_to(outside.with_name("nowhere")),
    "link to itself": lambda path, outside, content: path.symlink_to(path.name),
    "link to zeros": lambda path, outside, content: path.symlink_to("/dev/zero"),
}


def opened(open_: Callable[[Path], int]) -> Callable[[Path], bytes]:
    def read(path: Path) -> bytes:
        descriptor = open_(path)
        try:
            with contextlib.suppress(OSError):  # a descriptor that only writes
                return os.read(descriptor, LIMIT)
            return b""
        finally:
            os.close(descriptor)

    return read


READERS: dict[str, Callable[[Path], bytes]] = {
    "read_bytes": lambda path: safe_files.read_bytes(path, LIMIT),
    "read_piece": lambda path: safe_files.read_piece(path, 3, LIMIT),
    "read_tail": lambda path: safe_files.read_tail(path, LIMIT),
    "size": lambda path: bytes(safe_files.size(path) < 0),
    "open_to_read": opened(safe_files.open_to_read),
    "open_to_append": opened(safe_files.open_to_append),
    "open_to_lock": opened(safe_files.open_to_lock),
    "truncate_to_tail": lambda path: bytes(safe_files.truncate_to_tail(path, LIMIT) is not None),
    "link_or_copy": lambda path: bytes(safe_files.link_or_copy(path, path.with_name("copy")) is not None),
}
QUESTIONS: dict[str, Callable[[Path], Any]] = {
    "is_regular": safe_files.is_regular,
    "is_folder": safe_files.is_folder,
    "modified_ns": safe_files.modified_ns,
    "read_json": lambda path: safe_files.read_json(path, LIMIT),
}


@contextlib.contextmanager
def place(name: str, kind: str, content: bytes) -> Iterator[Path]:
    """Give a path of that name with such a thing at it, if one can be made; a file outside must stay as it is."""
    assume("/" not in name and name not in ("", ".", ".."))
    with tempfile.TemporaryDirectory(prefix="labkit-door-") as folder:
        inside, outside = Path(folder) / "run", Path(folder) / "outside"
        inside.mkdir()
        outside.write_bytes(SECRET)
        path = inside / name
        with contextlib.suppress(OSError, ValueError):
            KINDS[kind](path, outside, content)
        yield path
        assert outside.read_bytes() == SECRET
        assert not outside.with_name("nowhere").exists()


def every_name(test: Any) -> Any:
    """Draw names and contents, some odd ones always among them."""
    for name in ("a\0b", "half\ud83d", "stop.json"):
        test = example(name=name, content=b"{}")(test)
    return settings(max_examples=8, deadline=None)(given(name=names, content=contents)(test))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", KINDS)
@every_name
def test_a_reader_gets_bounded_content_or_one_refusal(reader: str, kind: str, name: str, content: bytes) -> None:
    with place(name, kind, content) as path:
        try:
            data = READERS[reader](path)
        except OSError as error:
            reason = error.strerror
        else:
            reason = "none"
            assert len(data) <= LIMIT
            assert SECRET not in data
        assert reason
        assert "\n" not in reason


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("kind", KINDS)
@every_name
def test_a_question_never_fails(question: str, kind: str, name: str, content: bytes) -> None:
    with place(name, kind, content) as path:
        assert QUESTIONS[question](path) != {"outside": True}


@pytest.mark.parametrize("kind", KINDS)
@every_name
def test_a_writer_takes_the_place_whole_or_refuses(kind: str, name: str, content: bytes) -> None:
    with place(name, kind, b"old") as path:
        with contextlib.suppress(OSError):
            safe_files.replace(path, content)
            assert not path.is_symlink()
            assert path.read_bytes() == content
        assert len(list(path.parent.iterdir())) <= 1, "a temporary file was left beside it"


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200) | contents)
def test_json_is_read_with_bounds_or_refused(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        safe_files.to_json(safe_files.from_json(data)).encode("ascii")  # what has been read can be written again


@settings(max_examples=200, deadline=None)
@given(text=any_text)
def test_text_for_a_terminal_is_printable(text: str) -> None:
    shown = safe_files.printable(text)
    assert shown.isprintable()
    shown.encode("utf-8")
