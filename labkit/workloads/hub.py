"""Loading a data set with Hugging Face `datasets`: from the hub, from a folder, from a parquet file.

Only data is ever read: `trust_remote_code` is not passed, and `datasets` from 4 on runs no script of a data set.
"""

from __future__ import annotations

import os
import socket
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from labkit.workloads.files import kind, split_of_file, walk
from labkit.workloads.rules import is_path
from labkit.workloads.splits import choose


def use_cache_when_offline() -> None:
    """Switch the Hugging Face libraries to their cache if their server cannot be reached.

    Otherwise they would retry for most of a minute. To be called before they are imported. Behind a proxy, and if
    HF_HUB_OFFLINE is set, nothing is tried.
    """
    if "HF_HUB_OFFLINE" in os.environ or getproxies():
        return
    server = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((server.hostname or "", server.port or 443), timeout=5).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"


def load(data: str) -> tuple[Any, Any | None, dict[str, Any]]:
    """Return the training and the held-out part of `data` as `datasets.Dataset` (None for none), and facts about them.

    `data` is a folder, a .parquet file, or a name on the hub: `name`, `owner/name` or `owner/name:configuration`.
    Raises ValueError in one sentence if nothing can be loaded.
    """
    if not is_path(data):
        use_cache_when_offline()
    import datasets

    datasets.disable_progress_bars()  # a rank writes to a log
    path = Path(data).expanduser()
    try:
        if is_path(data) and path.is_dir():
            loaded = datasets.load_dataset(**({"path": str(path)} | _data_files(path)))
        elif is_path(data):
            if path.exists() and kind(path) != "parquet":
                raise ValueError("it is not a parquet file")
            loaded = datasets.load_dataset("parquet", data_files={"train": str(path)})
        else:
            name, _, configuration = data.partition(":")
            loaded = datasets.load_dataset(name, configuration or None)
    except Exception as error:  # whatever the hub, the network or a file reader raises, users need one sentence
        raise ValueError(explain_load_error(data, error)) from error
    return split(loaded)


def _data_files(folder: Path) -> dict[str, Any]:
    """Return arguments that load a folder of parquet files by the splits in their names; {} for other folders."""
    files, _ = walk(folder)
    parquet = [file for file in files if kind(file) == "parquet"]
    if not parquet:
        return {}
    parquet_file = import_module("pyarrow.parquet").ParquetFile
    for file in parquet:
        try:
            parquet_file(file).close()
        except (OSError, ValueError) as error:  # pyarrow's own errors are subclasses of these
            raise ValueError(f"{file.relative_to(folder)} is damaged: {first_line(error)}") from error
    parts: dict[str, list[str]] = {}
    for file in parquet:
        parts.setdefault(split_of_file(file, folder) or "all", []).append(str(file))
    return {"path": "parquet", "data_files": parts}


def split(loaded: Any) -> tuple[Any, Any | None, dict[str, Any]]:
    """Pick the training and the held-out part of a `datasets.DatasetDict` by their names; return them with facts."""
    train, test, left_out = choose(list(loaded), "the data set")
    if len(train) > 1:
        raise ValueError(
            f"the data set has several parts to train on: {', '.join(train)}; give one of them as a folder"
        )
    about = {
        "train_split": train[0],
        "held_out": f"split {test[0]}" if test else "a part of the training split",
        "splits_left_out": [*test[1:], *left_out],
    }
    return loaded[train[0]], loaded[test[0]] if test else None, about


def column(dataset: Any, requested: str, what: str, candidates: list[str], option: str) -> str:
    """Return the column of a data set to use; see `choose_column`."""
    return choose_column(dataset.column_names, requested, what, candidates, option)


def choose_column(names: list[str], requested: str, what: str, candidates: list[str], option: str) -> str:
    """Return the column to use: `requested` if given, else the only candidate.

    Raises ValueError with the columns and the option if the column does not exist, or if there is a choice.
    """
    listing = ", ".join(map(str, names))
    if requested:
        if requested not in names:
            raise ValueError(f"there is no column {requested!r} ({option}); columns: {listing}")
        return requested
    if not candidates:
        raise ValueError(f"no column looks like {what}; name it with {option}; columns: {listing}")
    if len(candidates) > 1:
        raise ValueError(f"several columns may be the {what}: {', '.join(candidates)}; name it with {option}")
    return candidates[0]


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message (at most 300 characters), or its type if there is none."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 300 else f"{line[:300]}…"


def explain_load_error(data: str, error: Exception) -> str:
    """Return why `data` cannot be loaded and what to do instead, from the exception that was raised."""
    first = first_line(error)
    cause = error.__cause__ or error.__context__
    while cause is not None:  # datasets reports that "an error occurred"; only the causes say which
        if str(cause).strip() and first_line(cause) not in first:
            first = f"{first.rstrip('.')}: {first_line(cause)}"
            break
        cause = cause.__cause__ or cause.__context__
    if is_path(data):
        return f"cannot read {data}: {first or type(error).__name__}"
    text = first.lower()
    if isinstance(error, ConnectionError) or any(word in text for word in ("offline", "couldn't reach", "connect")):
        return (
            f"cannot reach the Hugging Face hub to load {data!r}; "
            "without internet, give a local folder or file, or what is built in"
        )
    return f"cannot load {data!r} from the Hugging Face hub: {first or type(error).__name__}"
