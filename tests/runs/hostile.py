"""Run directories made to harm their readers: pipes, links, devices, endless, nested, mistyped and steering content."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from labkit.experiment.run_directory import RunDirectory
from tests.runs.record import record

SIZE = 10 * 2**30
"""Of a file that is mostly a hole: it takes no room, but reading it whole would."""
DEEP = "[" * 200_000 + "]" * 200_000
STEERING = "\x1b]0;owned\x07\x1b[2J\u009b31m\u202eltr\u2066\x00\r\n</script><b>&amp;$x^2$"
SURROGATES = "bad \ud83d name \udcff"
FILES = ("status.json", "experiment.json", "summary.json", "progress.json", "rank-0.jsonl", "rank-0.log")

Change = Callable[[RunDirectory, Path], None]


def _put(directory: RunDirectory, name: str) -> Path:
    path = directory.path / name
    if path.is_symlink() or path.exists():
        path.unlink()
    return path


def pipe(name: str) -> Change:
    return lambda directory, outside: os.mkfifo(_put(directory, name))


def link_to(name: str, target: str) -> Change:
    return lambda directory, outside: _put(directory, name).symlink_to(target)


def link_outside(name: str) -> Change:
    def change(directory: RunDirectory, outside: Path) -> None:
        (outside / name).write_bytes((directory.path / name).read_bytes() if (directory.path / name).exists() else b"")
        _put(directory, name).symlink_to(outside / name)

    return change


def folder(name: str) -> Change:
    return lambda directory, outside: _put(directory, name).mkdir()


def hole(name: str) -> Change:
    def change(directory: RunDirectory, outside: Path) -> None:
        with _put(directory, name).open("wb") as file:
            file.truncate(SIZE)

    return change


def text(name: str, content: str | bytes) -> Change:
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    return lambda directory, outside: (_put(directory, name).write_bytes(data), None)[1]


def entries(name: str, /, **changes: Any) -> Change:
    """Other values for some entries of a JSON file."""

    def change(directory: RunDirectory, outside: Path) -> None:
        path = directory.path / name
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | changes))

    return change


def event(**fields: Any) -> Change:
    """A further event of rank 0."""

    def change(directory: RunDirectory, outside: Path) -> None:
        with directory.events(0).open("a") as file:
            file.write(json.dumps({"rank": 0, "time": 1.0, "monotonic": 1.0} | fields) + "\n")

    return change


def checkpoints_of_odd_names(directory: RunDirectory, outside: Path) -> None:
    for name in ("step-²", "step-", "step--1", "step-00000001", "step-٣", "step-" + "9" * 200, "step-\udcff"):
        place = os.fsencode(directory.checkpoints) + b"/" + name.encode("utf-8", "surrogateescape")
        os.makedirs(place, exist_ok=True)
        with open(place + b"/checkpoint.json", "wb") as file:
            file.write(b"{}")


def checkpoints_elsewhere(directory: RunDirectory, outside: Path) -> None:
    (outside / "step-00000001").mkdir()
    directory.checkpoints.symlink_to(outside)


def many_ranks(directory: RunDirectory, outside: Path) -> None:
    for rank in range(1, 3000):
        directory.events(rank).write_bytes(b'{"event": "start", "first": 0}\n')


def _texts(content: str) -> Change:
    def change(directory: RunDirectory, outside: Path) -> None:
        entries("status.json", title=content, layout=content, device=content)(directory, outside)
        cause = {"kind": content, "message": content, "log": [content], "rank": 0}
        entries("status.json", state="failed", cause=cause)(directory, outside)
        entries("experiment.json", name=content[:100])(directory, outside)
        entries("summary.json", run_id=content, layout=content, notes=[content], metrics={content: 1.0})(
            directory, outside
        )
        directory.log(0).write_bytes(content.encode("utf-8", "surrogatepass"))
        event(event="error", type=content, message=content, traceback=content)(directory, outside)
        event(event="evaluation", step=3, metrics={content: 1.0}, seconds=1.0)(directory, outside)

    return change


CHANGES: dict[str, Change] = {
    "untouched": lambda directory, outside: None,
    **{f"{name} is a pipe": pipe(name) for name in FILES},
    **{f"{name} is a link to endless zeros": link_to(name, "/dev/zero") for name in FILES},
    **{f"{name} is a link to a file outside": link_outside(name) for name in FILES},
    **{f"{name} is a folder": folder(name) for name in FILES},
    **{f"{name} has a hole of 10 GiB": hole(name) for name in FILES},
    "status.json is nested a mile deep": text("status.json", DEEP),
    "experiment.json is nested a mile deep": text("experiment.json", DEEP),
    "summary.json is nested 60 deep": text("summary.json", '{"a":' * 60 + "1" + "}" * 60),
    "summary.json has endless numbers": text("summary.json", '{"steps": 1' + "0" * 4000 + ', "loss": [[1e999, NaN]]}'),
    "status.json is no UTF-8": text("status.json", b"\xff\xfe{}"),
    "status.json has other types": entries(
        "status.json", title=[], created={}, ranks={"a": 1}, warnings=5, world_size="many", steps=[1], layout=7
    ),
    "status.json has endless ranks": entries("status.json", world_size=10**9, steps=10**18, created=1e308),
    "status.json is that of a live run": entries("status.json", state="running", supervisor={"pid": 1}),
    "stop.json is a pipe": pipe("stop.json"),
    ".lock is a dangling link": link_to(".lock", "/nowhere/labkit-lock"),
    ".lock is a pipe": pipe(".lock"),
    "report.html is a link to a file outside": link_outside("report.html"),
    "rank-0.jsonl has odd events": text(
        "rank-0.jsonl",
        'null\n[]\n{"event": []}\n{"event": "steps", "first": -1, "loss": {}}\n' + '{"event": "steps"' * 9,
    ),
    "texts steer the terminal": _texts(STEERING),
    "texts are halves of character pairs": _texts(SURROGATES),
    "checkpoints have odd names": checkpoints_of_odd_names,
    "checkpoints are elsewhere": checkpoints_elsewhere,
    "there are 3000 ranks": many_ranks,
    "a newer labkit wrote it": entries("experiment.json", schema_version=99, telepathy={"mode": "deep"}),
}
NAMES = {"a name that steers": "\x1b[31mred\u202e\u009bx", "a name of half a character": "half\udcff"}
"""Directory names, beside the content."""


def make(home: Path, outside: Path, change: str, name: str = "20260101-0000-hostile") -> RunDirectory:
    """A finished run of one rank with a good summary, then changed; `outside` is an empty folder."""
    directory = record(home, name, [0.01] * 20, "layout.dp_replicate=1")
    directory.log(0).write_text("a line\n")
    directory.summary.write_text(json.dumps({"run_id": name, "steps": 20, "metrics": {"loss": 0.5}}))
    directory.progress.write_text(json.dumps({"time": 1.0, "ranks": []}))
    CHANGES[change](directory, outside)
    return directory
