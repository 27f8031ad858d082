"""Loading a data set with Hugging Face `datasets`: from the hub, from a folder, from a parquet file.

Only data is ever read: `trust_remote_code` is not passed, and `datasets` from 4 on runs no script of a data set.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from labkit.workloads.rules import is_path

TEST_NAMES = ("test", "validation", "valid", "dev", "eval")


def load(data: str) -> tuple[Any, Any | None]:
    """The training and the held-out part of `data` as `datasets.Dataset`; the latter is None where there is none.

    `data` is a folder, a .parquet file, or a name on the hub: `name`, `owner/name` or `owner/name:configuration`.
    Raises ValueError in one sentence where nothing can be loaded.
    """
    import datasets

    path = Path(data).expanduser()
    try:
        if is_path(data):
            found = (
                datasets.load_dataset(str(path))
                if path.is_dir()
                else datasets.load_dataset("parquet", data_files={"train": str(path)})
            )
        else:
            name, _, configuration = data.partition(":")
            found = datasets.load_dataset(name, configuration or None)
    except Exception as error:  # whatever the hub, the network or a file reader raises, people need one sentence
        raise ValueError(_sentence(data, error)) from error
    return split(found)


def split(found: Any) -> tuple[Any, Any | None]:
    """Pick the training and the held-out part of a `datasets.DatasetDict` by their names."""
    names = list(found)
    train = "train" if "train" in names else names[0]
    test = next((name for name in TEST_NAMES if name in names and name != train), None)
    return found[train], None if test is None else found[test]


def column(dataset: Any, wanted: str, kind: str, candidates: list[str], option: str) -> str:
    """The column to use: `wanted` if given, else the only candidate; ValueError names the columns and the option."""
    names = ", ".join(dataset.column_names)
    if wanted:
        if wanted not in dataset.column_names:
            raise ValueError(f"there is no column {wanted!r} ({option}); columns: {names}")
        return wanted
    if not candidates:
        raise ValueError(f"no column looks like {kind}; name it with {option}; columns: {names}")
    return candidates[0]


def _sentence(data: str, error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    if is_path(data):
        return f"cannot read {data} as a data set: {first or type(error).__name__}"
    unreachable = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
    if unreachable or "offline" in first.lower() or "couldn't reach" in first.lower() or "connect" in first.lower():
        return (
            f"cannot reach the Hugging Face hub to load {data!r}; "
            "without internet, give a local folder or parquet file, or the built-in data"
        )
    return f"cannot load {data!r} from the Hugging Face hub: {first or type(error).__name__}"
