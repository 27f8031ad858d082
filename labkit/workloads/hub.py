"""Loading a data set with Hugging Face `datasets`: from the hub, from a folder, from a parquet file.

Only data is ever read: `trust_remote_code` is not passed, and `datasets` from 4 on runs no script of a data set.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from labkit.workloads.rules import is_path

TEST_NAMES = ("test", "validation", "valid", "dev", "eval")


def use_cache_when_offline() -> None:
    """Switch the Hugging Face libraries to what they have stored, if their server cannot be reached.

    They would try again and again for most of a minute otherwise. To be called before they are imported. Behind a
    proxy, and where HF_HUB_OFFLINE is set, nothing is tried.
    """
    if "HF_HUB_OFFLINE" in os.environ or getproxies():
        return
    server = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((server.hostname or "", server.port or 443), timeout=5).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"


def load(data: str) -> tuple[Any, Any | None]:
    """The training and the held-out part of `data` as `datasets.Dataset`; the latter is None where there is none.

    `data` is a folder, a .parquet file, or a name on the hub: `name`, `owner/name` or `owner/name:configuration`.
    Raises ValueError in one sentence where nothing can be loaded.
    """
    if not is_path(data):
        use_cache_when_offline()
    import datasets

    datasets.disable_progress_bars()  # a rank writes to a log
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
        raise ValueError(sentence(data, error)) from error
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


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, else its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def sentence(data: str, error: Exception) -> str:
    """Why `data` cannot be loaded and what to do instead, from whatever was raised."""
    first = (str(error).strip().splitlines() or [""])[0]
    if is_path(data):
        return f"cannot read {data}: {first or type(error).__name__}"
    said = first.lower()
    if isinstance(error, ConnectionError) or any(word in said for word in ("offline", "couldn't reach", "connect")):
        return (
            f"cannot reach the Hugging Face hub to load {data!r}; "
            "without internet, give a local folder or file, or what is built in"
        )
    return f"cannot load {data!r} from the Hugging Face hub: {first or type(error).__name__}"
