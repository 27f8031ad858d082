"""Text from files of any kind, from a folder of them, or from the hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from labkit.workloads.files import Folder, Kind, find_text_files, kind, read_text, rows
from labkit.workloads.rules import is_path

_NAMES = ("text", "content", "document", "sentence", "story", "article")
_TEST_SHARE_OF_LIMIT = 10
"""The held-out part is read up to a tenth of the limit: enough to judge by, and evaluation stays short."""
_ROWS_EXAMINED = 200
"""Number of rows by which a column is recognised as text."""

Row = tuple[str, dict[str, Any]]
"""(description of its place, values by column)."""


def hub_text(data: str, text_column: str, max_characters: int) -> tuple[str, str | None, dict[str, Any]]:
    """Return the training text, the held-out text (None: cut from the end of the training text), and facts about them.

    Files and folders named after splits are used as these splits. Rows are joined by an empty line, in their order,
    until there are `max_characters`. Raises ValueError in one sentence.
    """
    limit = max(1000, max_characters // _TEST_SHARE_OF_LIMIT)
    if not is_path(data):
        from labkit.workloads import hub

        train, test, about = hub.load(data)
        parts = [_dataset_rows(train, "training"), None if test is None else _dataset_rows(test, "held-out")]
        return _from_rows(parts[0] or [], parts[1], text_column, max_characters, limit, about)
    path = Path(data).expanduser()
    folder = find_text_files(path) if path.is_dir() else Folder(train=[path], kind=_kind_of_one(path))
    about = {
        "files": len(folder.train),
        "held_out": f"{_files(len(folder.held_out))} named {folder.split}" if folder.split else "the end of the text",
        "held_out_files": [str(file.relative_to(path)) for file in folder.held_out][:20],
        "skipped_files": folder.skipped,
    }
    if folder.kind == "text":
        if text_column:
            raise ValueError(f"there is no column {text_column!r} (workload.text_column): {data} is plain text")
        held_out = _joined(folder.held_out)[:limit] if folder.held_out else None
        return _joined(folder.train)[:max_characters], held_out, about
    test_rows = _rows_of(folder.held_out, folder.kind) if folder.held_out else None
    return _from_rows(_rows_of(folder.train, folder.kind), test_rows, text_column, max_characters, limit, about)


def _files(count: int) -> str:
    return f"{count} file" if count == 1 else f"{count} files"


def _kind_of_one(path: Path) -> Kind:
    """Return the kind of a single file; ValueError if it contains no text of a known kind."""
    what = kind(path)
    if what in ("image", "other"):
        raise ValueError(f"cannot read {path}: it contains no text in a known format (parquet, JSON, CSV, plain text)")
    return what


def _joined(files: list[Path]) -> str:
    return "\n\n".join(read_text(file) for file in files)


def _rows_of(files: list[Path], what: Kind) -> Iterator[Row]:
    for file in files:
        yield from rows(file, what)


def _dataset_rows(dataset: Any, name: str) -> Iterator[Row]:
    for number, row in enumerate(dataset):
        yield f"row {number} of the {name} part", row


def _from_rows(
    train: Iterable[Row],
    test: Iterable[Row] | None,
    text_column: str,
    max_characters: int,
    max_held_out: int,
    about: dict[str, Any],
) -> tuple[str, str | None, dict[str, Any]]:
    """Return training text, held-out text and facts, cut to `max_characters` and `max_held_out` characters."""
    ahead = []
    iterator = iter(train)
    for row in iterator:
        ahead.append(row)
        if len(ahead) == _ROWS_EXAMINED:
            break
    if not ahead:
        raise ValueError("the training part has no rows")
    column = _column([row for _, row in ahead], text_column)
    empty = [0]

    def all_rows() -> Iterator[Row]:
        yield from ahead
        yield from iterator

    text = _join(all_rows(), column, max_characters, empty)
    held_out = None if test is None else _join(test, column, max_held_out, empty)
    return text, held_out, about | {"text_column": column, "empty_rows": empty[0]}


def _column(examined: list[dict[str, Any]], text_column: str) -> str:
    """Return the column that contains the text."""
    from labkit.workloads.hub import choose_column

    names = list(dict.fromkeys(name for row in examined for name in row))
    strings = [
        name
        for name in names
        if any(isinstance(row.get(name), str) for row in examined)
        and all(isinstance(row.get(name), str | None) for row in examined)
    ]
    if not strings and not text_column:
        kinds = {name: type(next((row[name] for row in examined if row.get(name) is not None), None)) for name in names}
        listing = ", ".join(f"{name} ({kind.__name__})" for name, kind in kinds.items())
        raise ValueError(f"no column contains text; columns, and what they contain: {listing}")
    common = [name for name in _NAMES if name in strings]
    return choose_column(names, text_column, "text", common or strings, "workload.text_column")


def _join(table: Iterable[Row], column: str, limit: int, empty: list[int]) -> str:
    """Join the texts of the column with an empty line between them; rows without text are counted in `empty`."""
    parts, length = [], 0
    for place, row in table:
        text = row.get(column)
        if text is None or text == "":
            empty[0] += 1
            continue
        if not isinstance(text, str):
            raise ValueError(f"{place}: column {column!r} contains {type(text).__name__}, not text")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{place}: column {column!r} contains half a character (the lone surrogate {text[error.start]!a}), "
                "which is not text"
            ) from None
        parts.append(text)
        length += len(text) + 2
        if length >= limit:
            break
    return "\n\n".join(parts)[:limit]
