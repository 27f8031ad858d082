"""Text from a .txt file, a folder, a parquet file or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_NAMES = ("text", "content", "document", "sentence", "story", "article")
_TEST_SHARE_OF_LIMIT = 10
"""The held-out part is read up to a tenth of the limit: enough to judge by, and evaluation stays short."""


def hub_text(data: str, text_column: str, max_characters: int) -> tuple[str, str | None]:
    """The training text and the held-out text (None: cut from the end of the training text).

    Rows are joined by an empty line, in their order, until there are `max_characters`. Raises ValueError in a sentence.
    """
    path = Path(data).expanduser()
    if path.is_file() and path.suffix == ".txt":
        return _read(path)[:max_characters], None
    if path.is_dir() and any(path.glob("*.txt")):
        files = sorted(path.glob("*.txt"))
        return "\n\n".join(_read(file) for file in files)[:max_characters], None

    from labkit.workloads import hub

    train, test = hub.load(data)
    column = hub.column(train, text_column, "text", _text_columns(train), "workload.text_column")
    held_out = None if test is None else _join(test, column, max(1000, max_characters // _TEST_SHARE_OF_LIMIT))
    return _join(train, column, max_characters), held_out


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def _text_columns(rows: Any) -> list[str]:
    strings = [name for name, feature in rows.features.items() if getattr(feature, "dtype", "") in _STRINGS]
    return [name for name in _NAMES if name in strings] or strings


_STRINGS = ("string", "large_string")


def _join(rows: Any, column: str, limit: int) -> str:
    parts, length = [], 0
    for row in rows.select_columns([column]):
        text = row[column] or ""
        parts.append(text)
        length += len(text) + 2
        if length >= limit:
            break
    return "\n\n".join(parts)[:limit]
