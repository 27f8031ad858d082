"""Files of a user's data: which exist, what each contains, and rows of text from them.

A file's kind is determined by its content; the suffix decides only between kinds of plain text (`.csv` or a text with
commas). Every error names the file, and the line if there is one.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from labkit.workloads.splits import HELD_OUT, Split, split_of

Kind = Literal["parquet", "image", "json", "csv", "text", "other"]
_TABLES = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
_BINARY = {".parquet": "parquet", ".arrow": "arrow", ".feather": "feather"}
_IMAGES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
_IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".pnm")
_HEAD = 65_536
_SKIPPED_NAMES = ("readme", "license", "licence", "requirements", "dataset_info", "state", "metadata", "citation")
csv.field_size_limit(2**31 - 1)


def kind(path: Path) -> Kind:
    """Return what the file contains, by its first bytes. Raises ValueError if it cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    suffix = path.suffix.lower()
    if head.startswith(b"PAR1"):
        return "parquet"
    if suffix in _BINARY:
        raise ValueError(f"cannot read {path}: it is not a {_BINARY[suffix]} file: its first bytes are {head[:8]!r}")
    if head.startswith(_IMAGES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or suffix in _IMAGE_ENDINGS:
        return "image"
    if head.startswith((b"ARROW1", b"PK\x03\x04", b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ", b"%PDF")):
        return "other"
    if suffix in (".json", ".jsonl", ".ndjson", ".jsonlines"):
        return "json"
    if suffix in _TABLES:
        return "csv"
    return "text" if _is_text(head, suffix) else "other"


def _is_text(head: bytes, suffix: str) -> bool:
    """Return True if the first bytes of a file are text."""
    if suffix in (".txt", ".md", ".rst", ""):
        return True  # a text file that is not UTF-8 is refused by name rather than skipped
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return len(head) == _HEAD and error.start > len(head) - 4  # cut within a character
    return b"\x00" not in head


@dataclass
class Folder:
    """The files of a folder and of its subfolders, by split; files that are not used are counted by reason."""

    train: list[Path] = field(default_factory=list)
    held_out: list[Path] = field(default_factory=list)
    split: str = ""
    """Name of the held-out split; empty if there is none."""
    kind: Kind = "text"
    skipped: dict[str, int] = field(default_factory=dict)

    def skip(self, reason: str, count: int = 1) -> None:
        """Count files that are not used."""
        if count:
            self.skipped[reason] = self.skipped.get(reason, 0) + count


def walk(root: Path) -> tuple[list[Path], int]:
    """Return all regular files below `root`, sorted by path, and the number of hidden ones."""
    files, hidden = [], 0
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if not path.is_file():
            continue
        if any(part.startswith((".", "__")) for part in parts) or parts[-1] in ("Thumbs.db", "desktop.ini"):
            hidden += 1
        else:
            files.append(path)
    return files, hidden


def split_of_file(path: Path, root: Path) -> Split | None:
    """Return the split that a file's folders or its own name state; held out, if they state both."""
    parts = path.relative_to(root).parts
    splits = {split_of(part) for part in parts[:-1]} | {split_of(Path(parts[-1]).name)}
    choices: tuple[Split, ...] = (*HELD_OUT, "train")
    return next((split for split in choices if split in splits), None)


def find_text_files(root: Path) -> Folder:
    """Return the files of text or rows below `root`, all of one kind: parquet, JSON, CSV or plain text."""
    folder = Folder()
    files, hidden = walk(root)
    folder.skip("hidden", hidden)
    kinds = {path: kind(path) for path in files}
    named = {path: split_of_file(path, root) for path in files}
    described = [path for path in files if path.stem.lower() in _SKIPPED_NAMES and named[path] is None]
    usable = [path for path in files if path not in described or len(described) == len(files)]
    order: tuple[Kind, ...] = ("parquet", "json", "csv", "text")
    present = [name for name in order if any(kinds[path] == name for path in usable)]
    if not present:
        raise ValueError(f"{root} contains no text file: {_listing(files, root) or 'it is empty'}")
    if len(present) > 1:
        examples = ", ".join(
            f"{name} ({next(p for p in usable if kinds[p] == name).relative_to(root)})" for name in present
        )
        raise ValueError(f"{root} contains files of several kinds, {examples}: give one of the files, or separate them")
    folder.kind = present[0]
    chosen = [path for path in usable if kinds[path] == folder.kind]
    folder.skip("another kind of file", len(files) - len(chosen))
    by_split: dict[Split | None, list[Path]] = {"train": [], "test": [], "validation": [], None: []}
    for path in chosen:
        by_split[named[path]].append(path)
    folder.train = by_split["train"] or by_split[None]
    if not folder.train:
        raise ValueError(f"{root} contains held-out files only: {_listing(chosen, root)}")
    folder.skip("names no split, next to files named train", len(by_split[None]) if by_split["train"] else 0)
    for split in HELD_OUT:
        if by_split[split]:
            if folder.split:
                folder.skip(f"{split} split, next to a {folder.split} split", len(by_split[split]))
            else:
                folder.held_out, folder.split = by_split[split], split
    return folder


def _listing(files: list[Path], root: Path) -> str:
    """Return the first five files, as text."""
    names = [str(path.relative_to(root)) for path in files[:5]]
    return ", ".join(names) + (f" and {len(files) - 5} more" if len(files) > 5 else "")


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 file, without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def rows(path: Path, what: Kind) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place in words, row by column) of a table in a file; ValueError names file and place of an error."""
    if what == "parquet":
        yield from _parquet_rows(path)
    elif what == "csv":
        yield from _csv_rows(path)
    else:
        yield from _json_rows(path)


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    parquet = import_module("pyarrow.parquet")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1000):
                for row in batch.to_pylist():
                    yield f"{path}, row {number}", row
                    number += 1
    except (OSError, ValueError) as error:  # pyarrow's own errors are subclasses of these
        raise ValueError(f"cannot read {path} (row {number} or later): {error}".splitlines()[0]) from error


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    text = read_text(path)
    delimiter = _TABLES.get(path.suffix.lower(), ",")
    first = text.splitlines()[0] if text.strip() else ""
    if delimiter == ",":
        delimiter = max((",", ";", "\t", "|"), key=first.count)
    reader = csv.reader(text.splitlines(keepends=True), delimiter=delimiter)
    try:
        names = next(reader, [])
        if len(set(names)) != len(names):
            raise ValueError(f"{path} names a column twice in its first line: {', '.join(names)}")
        for row in reader:
            if not row:
                continue
            if len(row) != len(names):
                place = f"{path}, line {reader.line_num}"
                raise ValueError(f"{place}: {len(row)} fields, but the first line has {len(names)}")
            yield f"{path}, line {reader.line_num}", dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield objects, one per line or in one list (also under the only key of an object)."""
    text = read_text(path)
    whole: Any = None
    if text.lstrip().startswith("["):
        try:
            whole = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}: {error.msg}") from None
    elif text.lstrip().startswith("{"):
        try:
            whole = json.loads(text)
        except json.JSONDecodeError:
            whole = None  # one object per line
        if isinstance(whole, dict):
            lists = [value for value in whole.values() if isinstance(value, list)]
            whole = lists[0] if len(lists) == 1 and all(isinstance(row, dict) for row in lists[0]) else [whole]
    if whole is None:
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}: {error.msg}") from None
                yield from _object(row, f"{path}, line {number}")
    else:
        for number, row in enumerate(whole):
            yield from _object(row, f"{path}, row {number}")


def _object(row: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the row if it is an object; otherwise raise ValueError."""
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a row must be an object of columns, but it is {type(row).__name__}")
    yield place, row
